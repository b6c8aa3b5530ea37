import json

import pytest
import torch
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

from rac_modifier.calibration.trace_pool import HoldOut
from rac_modifier.evaluation.divergence import divergence
from rac_modifier.traces.store import TraceStore
from tests.tiny import TOKENS, entry, linears


@pytest.fixture
def settings(tmp_path):
    """A store of its own, which this run fills further than the shared one."""
    made = entry(tmp_path / "own.jsonl")
    return {
        "traces": made["traces"],
        "calibration": {**made["calibration"], "held_out_tokens": 300},
    }


def record(folder):
    return json.loads((folder / "rac_run.json").read_text())


def test_the_record_holds_what_measuring_again_finds(prune, settings, tmp_path, dense):
    model = prune(output_dir=tmp_path / "out", **settings)
    found = record(tmp_path / "out")["divergence"]
    hold_out = HoldOut(300)
    others = list(hold_out.others(TraceStore.read(tmp_path / "own.jsonl")))
    held = hold_out.held
    assert sum(t.tokens for t in others) >= TOKENS  # the calibration set had its tokens beside them
    sequences = [((*t.prompt_ids, *t.completion_ids), len(t.prompt_ids)) for t in held]
    expected = divergence(dense, model, sequences, label="x", bins=8, progress=False)
    assert found["kl"] == pytest.approx(expected.kl, rel=1e-3)
    assert found["agreement"] == pytest.approx(expected.agreement)
    assert found["sequences"] == len(held)
    assert len(found["bins"]) > 1
    assert f"{found['kl']:.4f} nats per token" in (tmp_path / "out" / "README.md").read_text()


def test_held_out_traces_are_not_calibrated_on(prune, settings, tmp_path, monkeypatch):
    from rac_modifier.calibration import calibration_set as source

    made = []
    inner = source.CalibrationLoader
    monkeypatch.setattr(
        source, "CalibrationLoader", lambda *args: made.append(inner(*args)) or made[0]
    )
    prune(**settings)
    hold_out = HoldOut(300)
    list(hold_out.others(TraceStore.read(tmp_path / "own.jsonl")))
    held = hold_out.held
    prompts = {t.prompt_ids for t in held}
    assert made[0].sequences
    assert not [s for s in made[0].sequences if tuple(s.ids[: s.prompt_tokens]) in prompts]


def test_what_a_later_modifier_does_counts_too(prune, settings, tmp_path):
    later = QuantizationModifier(targets=["Linear"], ignore=["lm_head"], scheme="FP8_DYNAMIC")
    prune(output_dir=tmp_path / "pruned", **settings)
    prune(output_dir=tmp_path / "both", later=[later], **settings)
    assert (
        record(tmp_path / "both")["divergence"]["kl"]
        != record(tmp_path / "pruned")["divergence"]["kl"]
    )


def test_what_is_not_measured_says_why(prune, tmp_path):
    prune(output_dir=tmp_path / "off")
    assert "no traces were held out" in record(tmp_path / "off")["divergence"]["not_measured"]
    prune(output_dir=tmp_path / "prompts", calibration={"tokens": 300, "mixture": {"prompts": 1.0}})
    assert "no traces were held out" in record(tmp_path / "prompts")["divergence"]["not_measured"]


def test_a_measure_that_fails_does_not_cost_the_model(
    prune, settings, tmp_path, monkeypatch, tiny_folder
):
    from rac_modifier.evaluation.run_divergence import DenseReference

    def fails(self, pruned, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(DenseReference, "divergence", fails)
    model = prune(output_dir=tmp_path / "out", **settings)
    assert record(tmp_path / "out")["divergence"] == {"not_measured": "out of memory"}
    before = AutoModelForCausalLM.from_pretrained(tiny_folder)
    name = next(iter(linears(model)))
    assert not torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)
