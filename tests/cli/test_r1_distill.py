"""`examples/r1_distill_1_5b.py`: its steps in their order, and all of them on the embedded
reasoner."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rac_modifier.errors import RacError

EXAMPLE = Path(__file__).parents[2] / "examples" / "r1_distill_1_5b.py"


def main(monkeypatch: pytest.MonkeyPatch, *words: str, **replaced: Any) -> None:
    """Run the script with these words, some of its functions replaced."""
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *words])
    names = runpy.run_path(str(EXAMPLE))
    names["main"].__globals__.update(replaced)
    names["main"]()


def test_the_steps_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    did: list[list[str]] = []

    def rac(*words: object) -> None:
        did.append([str(word) for word in words])
        if words[0] == "frontier" and "--check" not in words:
            (tmp_path / "o" / "rows.jsonl").touch()
            raise RacError("a server is gone")

    with pytest.raises(RacError, match="a server is gone"):
        main(monkeypatch, "--out", "o", rac=rac)
    model = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    grid = ["frontier", model, "--recipe-grid", "r1_distill_1_5b", "--out", "o"]
    serve = ["--serve", "--concurrency", "256"]
    assert did == [
        [*grid, "--check"],
        ["traces", "collect", model, "--recipe", "o/traces.yaml", *serve],
        grid,
        ["report", "o", "-o", "o/report.html", "--traces", "8"],  # of what there is
    ]


@pytest.mark.slow
def test_the_dry_run_takes_all_steps_and_a_second_one_takes_none_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(monkeypatch, "--dry-run", "--out", "out")
    assert "2:4 + int4" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [(row["label"], row["group"]) for row in rows] == [
        ("dense", "dense"),
        ("50 %", "sparse"),
        ("2:4", "sparse"),
        ("2:4 + int4", "sparse + quantized"),
        ("GPTQ int4", "dense quantized"),
    ]
    results = {path: json.loads(path.read_text()) for path in Path("out/benchmarks").glob("*.json")}
    assert len(results) == 2 * len(rows)
    assert {result["results"][0]["samples"] for result in results.values()} == {2}
    assert sum("paired" in result for result in results.values()) == 2 * (len(rows) - 1)
    page = (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "out" / "report.html").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.json*")}
    main(monkeypatch, "--dry-run", "--out", "out")
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / "out" / "report.html").read_text() == page
