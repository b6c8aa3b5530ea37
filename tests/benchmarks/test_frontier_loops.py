"""The table of frontier_loops.py."""

from __future__ import annotations

import json
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
    def trace(name, ids, finish):
        return {"id": name, "ids": ids, "finish": finish}

    with FrontierFolder(tmp_path) as folder:
        folder.begin({"model": "m"})
        whole, looping, other = trace("a", [1, 2, 3], "stop"), trace("b", [4] * 300, "length"), [*range(300)]
        folder.add({"label": "dense"}, [whole, looping, trace("c", [1] * 5, "stop")])
        folder.add({"label": "50 %"}, [trace("a", other, "length"), looping, trace("c", [1] * 9, "stop")])
    monkeypatch.setattr(sys, "argv", ["frontier_loops.py", str(tmp_path)])
    loops.main()
    assert capsys.readouterr().out.splitlines()[2:] == ["| dense | 3 | 1 | 1 | 1 | 4 |", "| 50 % | 3 | 2 | 1 | 1 | 9 |"]
    assert json.loads((tmp_path / "frontier.json").read_text())["model"] == "m"
