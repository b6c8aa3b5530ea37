"""REAPPruningModifier before ours: its record, and the experts that it leaves."""

import pytest
import torch
import yaml
from llmcompressor import oneshot

import rac_modifier
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.run import Run
from tests.llmcompressor.conftest import record_of
from tests.llmcompressor.modifier_helpers import INT8
from tests.llmcompressor.test_resume import result
from tests.tiny import EXPERTS, NAME, calibration_entry, entry, recipe, save_tiny_experts

CALIBRATES = "ReasoningAwareCalibrationModifier"


def test_experts_left_by_reap_are_pruned_as_in_a_run_of_its_own(tmp_path):
    """One recipe gives the bits of two runs on the same traces."""
    dense, store = str(save_tiny_experts(tmp_path / "dense")), tmp_path / "traces.jsonl"
    reap = {"REAPPruningModifier": {"sparsity": 0.5}}
    settings = {"solver": "sparsegpt", "quantization": INT8}
    at_once = {
        "reap_stage": {"reap_modifiers": reap},
        "pruning_stage": {"pruning_modifiers": {NAME: entry(store, **settings)}},
    }
    alone = {CALIBRATES: calibration_entry(store), **reap}
    shared = {"precision": "float32"}
    model = oneshot(
        model=dense,
        recipe=yaml.safe_dump(at_once, sort_keys=False),
        output_dir=str(tmp_path / "once"),
        **shared,
    )
    oneshot(
        model=dense,
        recipe=yaml.safe_dump({"reap_stage": {"reap_modifiers": alone}}, sort_keys=False),
        output_dir=str(tmp_path / "left"),
        **shared,
    )
    second = entry(store, **settings)
    second["traces"]["allow_off_policy"] = True
    oneshot(
        model=str(tmp_path / "left"),
        recipe=recipe(second),
        output_dir=str(tmp_path / "twice"),
        **shared,
    )
    (record, weights_at_once), (separate, weights_of_two) = (
        result(tmp_path / name) for name in ("once", "twice")
    )
    assert weights_at_once == weights_of_two
    assert record["modules"] == separate["modules"]
    names = {row["name"] for row in record["modules"]}
    assert sum(".experts." in name for name in names) == 2 * 3 * EXPERTS // 2
    assert not any(".experts.2." in name or ".experts.3." in name for name in names)
    assert {len(kept) for kept in record["experts_removed"]["kept"].values()} == {EXPERTS // 2}
    loaded = rac_modifier.load_model(tmp_path / "once", dtype="float32")
    ids = torch.arange(5, 35)[None]
    with torch.no_grad():  # grouped and looped experts add in another order
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_killed_run_goes_on_with_the_same_share_of_experts_only(tmp_path, monkeypatch):
    """None: no expert is removed."""
    save_tiny_experts(tmp_path / "dense", num_hidden_layers=1)

    def run(share):
        reap = {"REAPPruningModifier": {"sparsity": share}}
        stages = {
            **({"reap_stage": {"reap_modifiers": reap}} if share else {}),
            "pruning_stage": {"pruning_modifiers": {NAME: entry(tmp_path / "traces.jsonl")}},
        }
        recipe = yaml.safe_dump(stages, sort_keys=False)
        out = str(tmp_path / "out")
        oneshot(model=str(tmp_path / "dense"), recipe=recipe, output_dir=out, precision="float32")
        return record_of(tmp_path / "out")

    original, calls = Run.prune, []

    def killed(self, groups, per_call=None):
        calls.append(groups)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(self, groups, per_call)

    monkeypatch.setattr(Run, "prune", killed)
    with pytest.raises(KeyboardInterrupt):
        run(0.5)
    monkeypatch.undo()
    for other in (0.25, None):
        with pytest.raises(RacError, match=r"earlier modifiers has pruned \(REAPPruningModifier"):
            run(other)
    assert len(run(0.5)["modules"]) == 4 + 3 * EXPERTS // 2
