"""Results of benchmarks are kept as they arrive, asked once, and refused if asked otherwise."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation.results import EvalResult, Row, summarise
from rac_modifier.evaluation.stopping import Ending
from rac_modifier.frontier.benchmarks import (
    Benchmark,
    ask_benchmarks,
    check_benchmarks,
    missing_benchmarks,
)
from rac_modifier.frontier.folder import FrontierFolder

MATH = Benchmark("math", {"cap": 9, "samples": 1})
AIME = Benchmark("aime", {"cap": 9, "samples": 4})


def in_process():
    return nullcontext(())


def result(label: str, right: int = 3, problems: int = 4) -> EvalResult:
    ending = Ending("right", 2, 2, True)
    rows = [Row(f"p{i}", None, i < right, ending) for i in range(problems)]
    return summarise(rows, label=label, seconds=1.0, cap=9, temperature=0.6, seed=0)


def test_each_result_is_kept_and_asked_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(model, label, missing, servers):
        for benchmark in missing:
            asked.append(f"{label}: {benchmark.name}")
            if len(asked) == 2:
                raise KeyboardInterrupt
            if len(asked) == 3:
                raise RacError("the server is gone")
            yield benchmark, result("/a/path")

    with FrontierFolder(tmp_path) as folder, pytest.raises(KeyboardInterrupt):
        ask_benchmarks(folder, "a", tmp_path, [MATH, AIME], ask, in_process)
    with FrontierFolder(tmp_path) as folder:
        assert missing_benchmarks(folder, "a", [MATH, AIME]) == [AIME]
        why = ask_benchmarks(folder, "a", tmp_path, [MATH, AIME], ask, in_process)
        assert why == "the server is gone"
        assert ask_benchmarks(folder, "a", tmp_path, [MATH, AIME], ask, in_process) is None
        assert ask_benchmarks(folder, "a", tmp_path, [MATH, AIME], ask, in_process) is None
    assert asked == ["a: math", "a: aime", "a: aime", "a: aime"]
    kept = FrontierFolder(tmp_path)
    assert [entry["benchmark"] for entry in kept.benchmarks] == ["math", "aime"]
    stored = kept.benchmark("a", "math")
    assert EvalResult.from_dict(stored["result"]) == result("a")
    assert stored["asked"] == MATH.asked
    assert kept.benchmark("b", "math") is None
    check_benchmarks(kept, [MATH, AIME])
    other = Benchmark("math", {"cap": 8, "samples": 1, "seed": 2})
    with pytest.raises(RacError, match="results of math that were asked with another cap, seed;"):
        check_benchmarks(kept, [AIME, other])
