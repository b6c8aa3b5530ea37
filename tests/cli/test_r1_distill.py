"""`examples/r1_distill_1_5b.py` on the embedded reasoner."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "r1_distill_1_5b.py"


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Run the script with these words."""
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *words])
    runpy.run_path(str(EXAMPLE), run_name="__main__")


@pytest.mark.slow
def test_the_dry_run_takes_all_steps_and_a_second_one_takes_none_again(
    tmp_path, monkeypatch, capsys
):
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
