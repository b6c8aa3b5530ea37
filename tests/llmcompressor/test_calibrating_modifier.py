"""What both modifiers share: which modifiers count as later ones, the checks of a run, and its end."""

import json

import pytest
import torch
from accelerate import dispatch_model
from llmcompressor.core import create_session
from llmcompressor.core.state import State
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import PreTrainedModel

from rac_modifier import (
    RacError,
    ReasoningAwareCalibrationModifier,
    ReasoningAwareSparseGPTModifier,
    model_tools,
)
from rac_modifier.calibration import trace_budget
from rac_modifier.processes import Processes
from tests.llmcompressor.modifier_helpers import generic_loader, gptq_w4
from tests.tiny import calibration_entry, entry, is_2of4, linears


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
        "rac_modifier.llmcompressor.calibrating_modifier.present_processes", lambda: two
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


def test_a_dataset_beside_the_recipe_is_refused(prune):
    with pytest.raises(RacError, match="leave the dataset argument out"):
        prune(oneshot_options={"dataset": generic_loader()})


def test_a_session_with_calibration_data_is_refused(dense):
    """Without `oneshot`, which has the argument under another name."""
    state = State(model=dense)
    state.data.calib = generic_loader()
    with create_session(), pytest.raises(RacError, match="leave calib_data out"):
        ReasoningAwareSparseGPTModifier(**entry()).initialize(state)


def test_a_failed_run_leaves_nothing_behind_that_breaks_the_next(prune, monkeypatch):
    monkeypatch.setattr("rac_modifier.llmcompressor.solving.solve_many", None)
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
        "rac_modifier.llmcompressor.calibrating_modifier.build_calibration_set", None
    )
    settings = entry()
    settings["calibration"] = {
        **settings.get("calibration", {}),
        "tokens": 10**12,
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
    for module in (model_tools, trace_budget):
        monkeypatch.setattr(module, "accelerator", lambda: torch.device("cpu"))
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
def test_a_model_is_not_moved_where_nothing_is_held_out(prune, trace_store, monkeypatch):
    monkeypatch.setattr(
        "rac_modifier.llmcompressor.calibrating_modifier.streamed_to_accelerator",
        lambda model: pytest.fail("streamed"),
    )
    assert all(is_2of4(m.weight) for m in linears(prune()).values())


@pytest.mark.usefixtures("accelerator")
def test_a_dispatched_model_stays_where_it_is(prune, dense, trace_store):
    """Placed by accelerate, of which oneshot makes offloading of compressed-tensors: not moved, and pruned all the same."""
    dispatch_model(dense, device_map={"": "cpu"}, force_hooks=True)
    dense.hf_device_map = {"": "cpu"}
    assert all(is_2of4(m.weight) for m in linears(prune(model=dense)).values())
