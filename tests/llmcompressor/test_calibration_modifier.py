"""Calibration for other modifiers' sake, and what both modifiers share."""

import json

import pytest
import torch
from accelerate import dispatch_model
from llmcompressor import oneshot
from llmcompressor.core import create_session
from llmcompressor.core.state import State
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from transformers import AutoModelForCausalLM, PreTrainedModel

from rac_modifier import (
    RacError,
    ReasoningAwareCalibrationModifier,
    ReasoningAwareSparseGPTModifier,
    model_tools,
)
from rac_modifier.processes import Processes
from tests.llmcompressor.modifier_helpers import generic_loader, gptq_w4, int4
from tests.tiny import calibration_entry, entry, is_2of4, linears


def test_a_recipe_without_a_modifier_that_calibrates_is_refused(calibrate):
    with pytest.raises(RacError, match="calibrates nothing: the recipe has nothing else"):
        calibrate()
    rtn = QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="FP8_DYNAMIC")
    with pytest.raises(RacError, match="calibrates nothing: the recipe has QuantizationModifier"):
        calibrate(later=[rtn])


def test_it_stands_first_in_a_recipe(tiny_folder, tmp_path):
    """Behind a modifier that changes the model, its traces would count as those of another model."""
    own = ReasoningAwareCalibrationModifier(**calibration_entry(tmp_path / "traces.jsonl"))
    with pytest.raises(
        RacError,
        match=r"^ReasoningAwareCalibrationModifier stands behind GPTQModifier.*write it first",
    ):
        oneshot(model=str(tiny_folder), recipe=[gptq_w4(), own])
    assert not (tmp_path / "traces.jsonl").exists()


def test_the_record_names_the_method_and_the_traces(calibrate, record_of):
    record = record_of(calibrate, later=[gptq_w4()])
    assert record["method"] == "GPTQModifier"
    assert record["calibration"]["trace_tokens"] > 0
    assert "pattern" not in record
    assert type(CalibrationPipeline.from_modifiers([gptq_w4()])) is SequentialPipeline


def test_awq_runs_where_there_is_no_device_to_copy_to(calibrate):
    """Upstream's AWQModifier pins memory, which torch refuses there. Afterwards its cache is as it was."""
    pin = IntermediatesCache.pin_memory
    nearest = QuantizationModifier(ignore=["lm_head"], **int4())
    model, plain = calibrate(later=[AWQModifier(), nearest]), calibrate(later=[gptq_w4()])
    assert IntermediatesCache.pin_memory is pin
    norms = [name for name, _ in model.named_parameters() if name.endswith("layernorm.weight")]
    assert any(
        not torch.equal(model.get_parameter(name), plain.get_parameter(name)) for name in norms
    ), "AWQ scales them"
    for name, module in linears(model).items():
        if name != "lm_head":
            codes = module.weight.view(len(module.weight), -1, 32) / module.weight_scale[..., None]
            assert 7.0 < float(codes.abs().max()) <= 7.51, (
                name
            )  # rounded in the forward pass, and when it is saved


def test_autoround_learns_its_rounding_on_the_traces(calibrate, tiny_folder):
    """Upstream's AutoRoundModifier: its scales fit the codes, and some codes are not those nearest to the dense weights."""
    settings = {"iters": 8, "enable_torch_compile": False, "batch_size": 4, "ignore": ["lm_head"]}
    model = calibrate(later=[AutoRoundModifier(**settings, **int4())])
    dense = linears(AutoModelForCausalLM.from_pretrained(tiny_folder))
    moved = total = 0
    for name, module in linears(model).items():
        if name != "lm_head":
            weight, nearest = (
                w.detach().float().view(len(w), -1, 32) / module.weight_scale.float()[..., None]
                for w in (module.weight, dense[name].weight)
            )
            assert float((weight - weight.round()).abs().max()) < 0.05, name
            away = (weight.round() - nearest.round().clamp(-8, 7)).abs()
            assert int(away.max()) <= 1, name
            moved, total = moved + int(away.sum()), total + away.numel()
    assert 0.001 < moved / total < 0.2


def test_autoround_gets_rows_of_equal_length_and_others_whole_sequences(calibrate, monkeypatch):
    """It would count padding in its loss."""
    lengths, run = [], SequentialPipeline.__call__

    def recorded(model, dataloader, dataset_args):
        lengths.append([batch["input_ids"].shape[1] for batch in dataloader])
        return run(model, dataloader, dataset_args)

    monkeypatch.setattr(SequentialPipeline, "__call__", staticmethod(recorded))
    calibrate(
        later=[AutoRoundModifier(iters=1, enable_torch_compile=False, ignore=["lm_head"], **int4())]
    )
    calibrate(later=[gptq_w4()])
    rows, whole = lengths
    assert len(rows) > 1
    assert set(rows) == {max(whole)}
    assert len(set(whole)) > 1
    assert sum(whole) - max(whole) < sum(rows) <= sum(whole)


def test_autoround_with_zero_points_is_refused_before_sampling(calibrate, monkeypatch):
    """llm-compressor 0.14 leaves them out of the module that it saves (tests/contracts/test_pipelines.py)."""
    monkeypatch.setattr(
        ReasoningAwareCalibrationModifier, "prepare", lambda *args: pytest.fail("sampled")
    )
    asymmetric = {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False}
    groups = {"w": {"targets": ["Linear"], "weights": asymmetric}}
    with pytest.raises(
        RacError,
        match=r"AutoRoundModifier with symmetric: false: .* without their zero points; set sym",
    ):
        calibrate(later=[AutoRoundModifier(iters=1, ignore=["lm_head"], config_groups=groups)])


def test_no_weight_is_pruned(calibrate):
    model = calibrate(later=[gptq_w4()])
    assert all(float((m.weight == 0).float().mean()) < 0.2 for m in linears(model).values())


@pytest.mark.parametrize("place", [0, 1, 2])
def test_later_modifiers_are_those_behind_in_the_recipe(place):
    ours = ReasoningAwareSparseGPTModifier(**entry())
    others = [gptq_w4(), QuantizationModifier(targets=["Linear"], scheme="FP8_DYNAMIC")]
    recipe = [*others[:place], ours, *others[place:]]
    with create_session() as session:
        session.lifecycle.recipe.modifiers = recipe
        assert ours.other_modifiers() == others
        assert ours.other_modifiers(later=True) == others[place:]


def test_processes_that_have_not_joined_are_refused(prune, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RacError, match="torchrun started 2 processes, and they have not joined"):
        prune()


def test_several_processes_without_pruning_are_refused(calibrate, monkeypatch):
    two = Processes(0, 2)
    monkeypatch.setattr(
        "rac_modifier.llmcompressor.calibration_modifier.present_processes", lambda: two
    )
    with pytest.raises(
        RacError, match="ReasoningAwareCalibrationModifier beside GPTQModifier runs in one process"
    ):
        calibrate(later=[gptq_w4()])


def test_two_of_our_modifiers_are_refused(prune, trace_store):
    with pytest.raises(RacError, match="the recipe has two ReasoningAwareSparseGPTModifier"):
        prune(
            later=[ReasoningAwareSparseGPTModifier(**entry(trace_store))],
            solver="wanda",
            reconstruct="pruned",
        )
    shared = calibration_entry(trace_store)
    with pytest.raises(RacError, match="leave ReasoningAwareCalibrationModifier out"):
        prune(
            later=[ReasoningAwareCalibrationModifier(**shared)],
            solver="wanda",
            reconstruct="pruned",
        )


def test_a_session_with_calibration_data_is_refused(dense):
    """Without `oneshot`, which has the argument under another name."""
    state = State(model=dense)
    state.data.calib = generic_loader()
    with create_session(), pytest.raises(RacError, match="leave calib_data out"):
        ReasoningAwareSparseGPTModifier(**entry()).initialize(state)


def test_a_failed_run_leaves_nothing_behind_that_breaks_the_next(prune, monkeypatch):
    monkeypatch.setattr("rac_modifier.llmcompressor.run.solve_groups", None)
    with pytest.raises(TypeError):
        prune()
    monkeypatch.undo()
    assert all(is_2of4(m.weight) for m in linears(prune()).values())


def test_a_given_calibration_set_takes_the_place_of_the_recipes(
    prune, trace_store, tiny_folder, monkeypatch
):
    from llmcompressor import oneshot

    first = ReasoningAwareSparseGPTModifier(**entry(trace_store))
    oneshot(model=str(tiny_folder), recipe=first)
    monkeypatch.setattr(
        "rac_modifier.llmcompressor.calibration_modifier.build_calibration_set", None
    )
    settings = entry()
    settings["calibration"] = {
        **settings.get("calibration", {}),
        "tokens": 10**9,
    }  # far more than fit; without effect
    second = ReasoningAwareSparseGPTModifier(**settings)
    second.use_calibration_set(first.calibration_set)
    model = oneshot(model=str(tiny_folder), recipe=second)
    monkeypatch.undo()
    expected = prune()
    assert all(
        torch.equal(m.weight, expected.get_submodule(n).weight) for n, m in linears(model).items()
    )


@pytest.fixture
def accelerator(monkeypatch):
    """The CPU in the part of an accelerator without room for the model, to which it must not be moved as a whole."""
    monkeypatch.setattr(model_tools, "accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(model_tools, "free_bytes", lambda device: 0)
    monkeypatch.setattr(
        PreTrainedModel, "to", lambda self, device: pytest.fail(f"moved to {device}")
    )


def test_a_model_larger_than_the_accelerator_is_measured_as_any_other(
    prune, trace_store, tmp_path, request
):
    """On held-out traces, with a full store: its weights are streamed, and the record is that of a run without an accelerator."""
    changes = {"calibration": {"tokens": 1500, "batch_tokens": 512, "held_out_tokens": 300}}
    store = {**entry(tmp_path / "own.jsonl")["traces"]}
    prune(output_dir=tmp_path / "expected", traces=store, **changes)
    request.getfixturevalue("accelerator")
    prune(output_dir=tmp_path / "found", traces=store, **changes)
    expected, found = (
        json.loads((tmp_path / name / "rac_run.json").read_text())["divergence"]
        for name in ("expected", "found")
    )
    assert expected.pop("seconds") > 0
    assert found.pop("seconds") > 0
    assert found == expected
    assert found["kl"] > 0


@pytest.mark.usefixtures("accelerator")
def test_a_dispatched_model_stays_where_it_is(prune, dense, trace_store):
    """Placed by accelerate, of which oneshot makes offloading of compressed-tensors: not moved, and pruned all the same."""
    dispatch_model(dense, device_map={"": "cpu"}, force_hooks=True)
    dense.hf_device_map = {"": "cpu"}
    assert all(is_2of4(m.weight) for m in linears(prune(model=dense)).values())
