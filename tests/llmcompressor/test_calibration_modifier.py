"""Calibration for other modifiers' sake."""

import pytest
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from transformers import AutoModelForCausalLM

from rac_modifier import RacError, ReasoningAwareCalibrationModifier
from tests.llmcompressor.modifier_helpers import gptq_w4, int4
from tests.tiny import calibration_entry, linears


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
            assert int(away.max()) == 1, name
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
        ReasoningAwareCalibrationModifier, "build_calibration", lambda *args: pytest.fail("sampled")
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
