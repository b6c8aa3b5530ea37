"""REAPPruningModifier before ours: its record, and the experts that it leaves."""

import torch
import yaml
from llmcompressor import oneshot

import rac_modifier
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
