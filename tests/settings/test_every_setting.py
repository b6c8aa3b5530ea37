"""Every setting of pruning changes the result. A new setting needs a row in every_setting.py."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.settings.pruning import PruningSettings
from rac_modifier.settings.quantization import QuantizationSettings
from tests.settings.every_setting import BASE, PRUNED, Row, merged, nested
from tests.tiny import save_tiny, save_tiny_experts


def test_every_setting_has_a_row():
    quantization = {f"quantization.{name}" for name in QuantizationSettings.model_fields}
    settings = set(PruningSettings.model_fields) - {"quantization"} | quantization
    assert {row.path for row in PRUNED} == settings


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
    modifier = ReasoningAwareSparseGPTModifier(**copy.deepcopy(settings))
    oneshot(model=loaded, recipe=modifier, output_dir=str(save_to))
    weights = {
        key: hashlib.sha256(value.float().numpy().tobytes()).hexdigest()
        for key, value in loaded.state_dict().items()
    }
    files = {path.name: path.stat().st_size for path in save_to.glob("*.safetensors")}
    return weights, files, json.loads((save_to / "rac_run.json").read_text())["order"]


@pytest.mark.slow
@pytest.mark.parametrize("row", PRUNED, ids=lambda row: row.path)
def test_a_setting_changes_the_result(row: Row, models, results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = models / ("experts" if row.path.startswith("expert") else "dense")
    base = merged(BASE, row.base)
    key = json.dumps([model.name, base], sort_keys=True)
    if key not in results:
        results[key] = pruned(model, base, tmp_path / "before")
    changed = merged(base, nested(row.path, row.value))
    assert pruned(model, changed, tmp_path / "after") != results[key]
