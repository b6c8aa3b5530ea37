"""No file of a whole run holds a path of the machine: every written file is searched."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from llmcompressor import oneshot

import rac_modifier
from rac_modifier import cli
from tests.tiny import entry, recipe, save_tiny


@pytest.mark.slow
@pytest.mark.parametrize("way", ["oneshot", "command line"])
def test_every_written_file(tmp_path: Path, way: str) -> None:
    base = save_tiny(tmp_path / "base" / "Tiny-1B")
    settings = entry(tmp_path / "stores" / "traces.jsonl")
    settings["calibration"] = {"tokens": 400}
    (tmp_path / "stores").mkdir()
    out = tmp_path / "out"
    if way == "oneshot":
        oneshot(model=str(base), recipe=recipe(settings), precision="float32", output_dir=str(out))
    else:
        (tmp_path / "base" / "recipe.yaml").write_text(recipe(settings))
        command = ["prune", base, out, "-r", tmp_path / "base" / "recipe.yaml"]
        cli.app([str(part) for part in command], standalone_mode=False)
    rac_modifier.load_model(out).save_pretrained(tmp_path / "again")
    files = [
        path
        for folder in ("out", "stores", "again")
        for path in (tmp_path / folder).rglob("*")
        if path.is_file()
    ]
    assert {"config.json", "rac_run.json", "recipe.yaml", "README.md", "traces.jsonl"} <= {
        path.name for path in files
    }
    for path in files:
        assert str(tmp_path).encode() not in path.read_bytes(), path.relative_to(tmp_path)
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert "Tiny-1B pruned" in (out / "README.md").read_text()
    assert "traces.jsonl" in str(written)
