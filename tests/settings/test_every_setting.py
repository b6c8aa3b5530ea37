"""Every setting of pruning changes the result. A new setting needs a row in PRUNED."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.settings.pruning import PruningSettings, QuantizationSettings
from tests.settings.test_entries import merged, nested
from tests.tiny import save_tiny, save_tiny_experts

BASE: dict[str, Any] = {
    "mask_structure": "2:4",
    "traces": {"sampling": {"max_new_tokens": 12, "temperature": 1.0}},
    "calibration": {"tokens": 300, "held_out_tokens": 0},
}
INT4 = {"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}}}
INT4_16 = {"g": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 16}}}
PLAIN = {"mask_structure": None, "sparsity": 0.5}
# By setting: a value, and what differs from BASE in the run that it is compared with.
PRUNED: dict[str, tuple[Any, dict[str, Any]]] = {
    "sparsity": (0.7, PLAIN),
    "mask_structure": ("1:4", {}),
    "quantization.scheme": ("W8A8", {"quantization": {"scheme": "FP8_DYNAMIC"}}),
    "quantization.config_groups": (INT4_16, {"quantization": INT4}),
    "quantization.group_size": (16, {"quantization": {"scheme": "W4A16", "group_size": 32}}),
    "preset": ("paper", {}),
    "solver": ("magnitude", {}),
    "refit": (True, {"preset": "paper", **PLAIN}),
    "reconstruct": ("pruned", {}),
    "iterations": (2, {}),
    "dampening_frac": (0.5, {}),
    "order": ("layer", {"reconstruct": "pruned"}),
    "expert_floor": (64, {}),
    "targets": (["re:.*mlp.*"], {}),
    "ignore": (["re:.*q_proj"], {}),
    "storage": ("dense", {}),
}


def test_every_setting_has_a_row():
    quantization = {f"quantization.{name}" for name in QuantizationSettings.model_fields}
    assert PRUNED.keys() == set(PruningSettings.model_fields) - {"quantization"} | quantization


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a small model, and of one with experts."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "dense", num_hidden_layers=1)
    save_tiny_experts(folder / "experts", num_hidden_layers=1)
    return folder


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What each base gave: many rows share one."""
    return {}


def pruned(model: Path, settings: dict[str, Any], save_to: Path) -> Any:
    """The weights that a run leaves, the sizes of its files, and its order."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    modifier = ReasoningAwareSparseGPTModifier(**settings)
    oneshot(model=loaded, recipe=modifier, output_dir=str(save_to))
    weights = {
        key: hashlib.sha256(value.float().numpy().tobytes()).hexdigest()
        for key, value in loaded.state_dict().items()
    }
    files = {path.name: path.stat().st_size for path in save_to.glob("*.safetensors")}
    return weights, files, json.loads((save_to / "rac_run.json").read_text())["order"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRUNED)
def test_a_setting_changes_the_result(name, models, results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value, changes = PRUNED[name]
    model = models / ("experts" if name.startswith("expert") else "dense")
    base = merged(BASE, changes)
    key = json.dumps([model.name, base], sort_keys=True)
    if key not in results:
        results[key] = pruned(model, base, tmp_path / "before")
    assert pruned(model, merged(base, nested(name, value)), tmp_path / "after") != results[key]
