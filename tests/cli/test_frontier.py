"""`rac frontier` on the tiny model: checked whole, run once per row, and shown by
`rac report`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from rac_modifier.cli.frontier import _held_out_of, _tools_of
from rac_modifier.errors import RacError
from rac_modifier.settings.grid import GridEvaluation
from rac_modifier.settings.sampling import PromptSettings
from rac_modifier.traces.store import TraceStore
from tests.sampling import fake_vllm
from tests.tiny import NAME, entry

GROUPS = {"num_bits": 4, "strategy": "group", "group_size": 32}
W4 = {"config_groups": {"w": {"targets": ["Linear"], "weights": GROUPS}}, "ignore": ["lm_head"]}
GPTQ = {"ReasoningAwareCalibrationModifier": {}, "GPTQModifier": W4}
SPARSE = {"label": "2:4", "recipe": {NAME: {"mask_structure": "2:4"}}}
ROWS = [SPARSE, {"label": "int4", "recipe": GPTQ}]


@pytest.fixture
def grid(trace_store, tmp_path) -> Any:
    """Writes a grid of the tiny model; its rows read a copy of the store."""
    store = shutil.copy(trace_store, tmp_path / "traces.jsonl")
    calibration = {"tokens": 500, "held_out_tokens": 0}

    def write(rows: list[dict[str, Any]], **evaluation: Any) -> Path:
        content = {
            "shared": {"traces": entry(store)["traces"], "calibration": calibration},
            "evaluation": {"problems": 3, "cap": 20, **evaluation},
            "rows": rows,
        }
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path / "grid.yaml"

    return write


def test_a_whole_grid_is_checked_before_anything_runs(rac, grid, tiny_folder, tmp_path):
    rows = [
        *ROWS,
        {"label": "3:6", "recipe": {NAME: {"mask_structure": "3:6"}}},
        {"label": "groups", "recipe": {**GPTQ, "GPTQModifier": {"scheme": "W4A16"}}},
    ]
    words = ("frontier", tiny_folder, "--out", tmp_path / "out", "--recipe-grid")
    code, out, error = rac(*words, grid(rows))
    assert (code, out) == (1, "")
    assert "- 3:6: model.layers.0.self_attn.q_proj" in error
    assert (
        "- groups: GPTQModifier: model.layers.0.self_attn.q_proj has 64 inputs, no "
        "multiple of the group_size" in error
    )
    assert "Rows that could run: 2:4, int4" in error
    code, out, _ = rac(*words, grid(ROWS), "--check")
    assert (code, out.splitlines()) == (0, ["2:4: sparse", "int4: dense quantized"])
    assert not (tmp_path / "out").exists()


def test_round_to_nearest_is_a_row_too(rac, grid, tiny_folder, tmp_path):
    """It calibrates on nothing, so that its recipe has no entry of ours; a row is run once."""
    path = grid([{"label": "nearest", "recipe": {"QuantizationModifier": W4}}])
    words = ("frontier", tiny_folder, "--recipe-grid", path, "--out", tmp_path / "out")
    rac.output(*words)
    rows = tmp_path / "out" / "rows.jsonl"
    before = rows.read_bytes()
    dense, row = map(json.loads, before.splitlines())
    assert row["group"] == "dense quantized"
    # a scale of 32 bits for 32 weights
    assert row["bytes"]["bits_per_weight"] == pytest.approx(5.0)
    assert row["bytes"]["total"] < dense["bytes"]["total"]
    assert row["divergence"]["kl"] > 0
    assert "2 rows in " in rac.output(*words)
    assert rows.read_bytes() == before
    assert rac("report", tmp_path / "out", "-o", tmp_path / "report.html")[0] == 0
    for check in ([], ["--check"]):
        code, out, error = rac(*words, "--precision", "bfloat16", *check)
        assert (code, out) == (1, ""), "a check refuses the folder that the run would refuse"
        assert "was measured with another precision" in error


def test_problems_of_which_some_lack_an_answer_are_refused(tmp_path):
    """Nothing would be graded, in no row, and no message would say so."""
    file = tmp_path / "q.jsonl"
    file.write_text('{"problem": "1+1?", "a": "2"}\n{"problem": "1+2?", "a": null}\n')
    evaluation = GridEvaluation(source=str(file), answer_column="a", problems=2)
    with pytest.raises(RacError, match=r"1 of 2 problems have no answer .*; complete them, name"):
        _held_out_of(evaluation, PromptSettings())
    evaluation = evaluation.model_copy(update={"answer_column": None})
    assert not _held_out_of(evaluation, PromptSettings()).graded


def test_a_model_is_served_and_timed(tiny_folder, tmp_path, vllm):
    evaluation = GridEvaluation(serve=True, concurrency=3, problems=2, cap=6)
    held_out = _held_out_of(evaluation, PromptSettings())
    stale = tmp_path / "served" / "a-ca978112.jsonl"  # of the label "a", of a killed run
    stale.parent.mkdir()
    for path in (stale, TraceStore.pending_path(stale)):
        path.write_text("its seconds would be lost\n")
    tools = _tools_of(str(tiny_folder), evaluation, held_out, tmp_path, "float32")
    result = tools.serve(tiny_folder, "a")
    assert (result.label, result.problems) == ("a", 2)
    assert result.tokens_per_second > 0
    assert [start["argv"][1] for start in fake_vllm.starts(tmp_path)] == [str(tiny_folder)]
    assert fake_vllm.left_over(tmp_path) == []
