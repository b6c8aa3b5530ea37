"""Smoke tests of bench/: the suites import, the tables of docs/ are those of results/, random
models are what their forms say."""

import ast
import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bench.__main__ import SUITES, main
from bench.experts import with_experts
from bench.formats import FORMATS
from bench.grid import CALIBRATIONS, OURS, VARIANTS, calibrated_on, pattern
from bench.models import reasoner, smollm2
from bench.recovery import entry_of
from bench.shapes import Form, random_mask, random_model
from bench.stopping import is_detected
from rac_modifier.reasoner import reasoner_path
from rac_modifier.settings.grid import Grid, plan_rows

ROOT = Path(__file__).parents[2]


def test_the_list_names_every_suite(capsys):
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_options_and_a_tiny_mode(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--tiny", "--help"])  # the options of the tiny mode are parsed before the help
    assert stop.value.code == 0
    assert "--tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("length", "copies", "detected"), [(8, 3, True), (8, 2, False), (7, 3, False), (129, 3, False)]
)
def test_copies_of_a_pattern_are_detected(length, copies, detected):
    answer = [500, 501, *(list(range(length)) * copies), 502]
    assert is_detected(tuple(answer)) == detected


def test_what_a_suite_imports_late_exists():
    for path in (ROOT / "bench").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rac_modifier"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    assert hasattr(module, alias.name) or importlib.import_module(name), path


def test_the_tables_of_the_docs_are_those_of_results():
    """If this fails: make results."""
    command = [sys.executable, "-m", "bench.render", "--check"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


def test_every_result_names_its_measurement_and_is_shown():
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    for path in (ROOT / "results").glob("*.json"):
        result = json.loads(path.read_text())
        if "columns" not in result:  # offgrid.json is a report
            continue
        assert {"model", "machine", "date", "commit", "command"} <= result.keys(), path.name
        assert all(len(row) == len(result["columns"]) for row in result["rows"]), path.name
        assert f"<!-- table {path.stem} -->" in pages, path.name


def test_rows_of_the_grids_are_settings_that_exist(tmp_path):
    rows, small = [], reasoner(tmp_path)
    for (name, entry), kind in itertools.product(VARIANTS.items(), CALIBRATIONS):
        row = {"label": f"{name}, {kind}", "recipe": {OURS: {**pattern("2:4"), **entry}}}
        rows.append(row | {"set": calibrated_on(kind, small)})
    formats = yaml.safe_load(FORMATS.read_text())["rows"]
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").touch()  # the model is there
    chat = smollm2(tmp_path)
    for subject, its_rows in ((small, rows), (chat, formats)):
        calibration = {**subject.shared.get("calibration", {}), "tokens": 512}
        shared = {**subject.shared, "calibration": calibration}
        grid = {"shared": shared, "evaluation": subject.evaluation, "rows": its_rows}
        assert len(plan_rows(Grid.model_validate(grid), "bench")) == len(its_rows)


def test_a_pattern_names_bits_and_preset():
    """The settings are those of a recipe."""
    entry = entry_of("2:4+int4+paper")
    assert (entry["mask_structure"], entry["preset"]) == ("2:4", "paper")
    row = {"label": "x", "recipe": {OURS: entry}}
    assert plan_rows(Grid.model_validate({"rows": [row]}), "bench")


def test_a_random_model_has_the_form_that_was_asked_for(tmp_path):
    mask = random_mask(8, 64, "2:4").view(8, 16, 4)
    assert torch.equal(mask.sum(-1), torch.full((8, 16), 2))
    folder = random_model(tmp_path, Form.parse("int4"), 1, 64)
    words = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight_packed"]
    assert words.shape == (8960, 1536 * 4 // 32)
    codes = torch.stack([words >> 4 * at & 15 for at in range(8)], dim=-1)
    assert set(codes.unique().tolist()) == {*range(1, 16)}  # symmetric: -7 to 7, plus 8


def test_the_mixture_is_the_dense_model_where_a_token_meets_every_quarter():
    dense = AutoModelForCausalLM.from_pretrained(reasoner_path(), dtype=torch.float32).eval()
    model = with_experts(dense).eval()
    ids = torch.arange(4, 24)[None]
    chosen = torch.tensor([[0, 5, 10, 15]]).expand(ids.numel(), 4)  # of each quarter a copy
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda _module, _inputs, output: (output[0], torch.full_like(output[1], 0.25), chosen)
        )
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)
