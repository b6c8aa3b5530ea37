"""The table of frontier_loops.py."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest

from rac_modifier.frontier.folder import FrontierFolder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import frontier_loops

    return frontier_loops


def test_the_table_counts_cut_and_looping_answers(loops, tmp_path, monkeypatch, capsys):
    def trace(name, ids, finish, **values):
        return {"id": name, "ids": ids, "finish": finish, **values}

    looping = [8, 9] + [4] * 300  # 299 tokens repeat
    kl = {"a": [0.5] * 3, "b": [0.2] * 3 + [0.01] * 299, "c": [1.1] * 5}
    with FrontierFolder(tmp_path) as folder:
        folder.begin({"model": "m"})
        answers = (
            trace("a", [1, 2, 3], "stop"),
            trace("b", looping, "length"),
            trace("c", [1] * 5, "stop"),
        )
        folder.add({"label": "dense"}, list(answers))
        own = [("a", [*range(300)], "length"), ("b", looping, "length"), ("c", [1] * 9, "stop")]
        folder.add({"label": "50 %"}, [trace(*each, kl=kl[each[0]]) for each in own])
    monkeypatch.setattr(sys, "argv", ["frontier_loops.py", str(tmp_path)])
    loops.main()
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[0]
        == "299 of the 310 tokens of the dense model's answers repeat what stands before them."
    )
    outside = (3 * 0.5 + 3 * 0.2 + 5 * 1.1) / 11
    assert lines[4:] == [
        "| dense | 3 | 1 | 1 | 1 | 4 | - | - |",
        f"| 50 % | 3 | 2 | 1 | 1 | 9 | {outside:.3f} | 0.010 |",
    ]
    monkeypatch.setattr(sys, "argv", ["frontier_loops.py", str(tmp_path), "--beside", "dense"])
    loops.main()
    assert capsys.readouterr().out.splitlines()[6:] == [
        "50 % beside dense: 1 answers cut here alone, 0 there alone (McNemar p = 1)"
    ]
    monkeypatch.setattr(sys, "argv", ["frontier_loops.py", str(tmp_path), "--beside", "50 %"])
    loops.main()
    assert capsys.readouterr().out.splitlines()[6:] == [
        "dense beside 50 %: 0 answers cut here alone, 1 there alone (McNemar p = 1)"
    ]
    assert json.loads((tmp_path / "frontier.json").read_text())["model"] == "m"


def test_two_rows_are_paired_over_answers(loops):
    """Answers of one length: the mean of their differences, and the standard error of that mean."""
    first = [{"id": name, "kl": [0.5, 0.1]} for name in "abc"]
    second = [
        {"id": name, "kl": [0.5 + more, 0.1 + more]}
        for name, more in zip("cab", (0.1, 0.2, 0.6), strict=True)
    ]
    more, error = loops.paired(first, second)
    assert more == pytest.approx(0.3)
    assert error == pytest.approx(statistics.stdev((0.1, 0.2, 0.6)) / 3**0.5)


def test_cut_answers_are_paired_too(loops):
    """Of ten problems: cut in both 1, in the first alone 6, in the second alone 1; 2 (1 + 7) / 2^7 = 0.125."""
    ends = [
        ("length", "length"),
        *[("length", "stop")] * 6,
        ("stop", "length"),
        *[("stop", "stop")] * 2,
    ]
    first, second = (
        [{"id": i, "finish": end[which]} for i, end in enumerate(ends)] for which in (0, 1)
    )
    assert (
        loops.cut_beside(first, second)
        == "1 answers cut here alone, 6 there alone (McNemar p = 0.12)"
    )
