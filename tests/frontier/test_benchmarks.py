"""Results of benchmarks are kept one by one, asked once, and refused where they were asked otherwise."""

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


def here():
    """Asked in this process, of no server."""
    return nullcontext(())


MATH, AIME = (
    Benchmark("math", {"cap": 9, "samples": 1}),
    Benchmark("aime", {"cap": 9, "samples": 4}),
)


def result(label: str, right: int = 3, problems: int = 4) -> EvalResult:
    ending = Ending("right", 2, 2, True)
    rows = [Row(f"p{i}", None, i < right, "", 0, ending) for i in range(problems)]
    return summarise(rows, label=label, seconds=1.0, cap=9, temperature=0.6, seed=0)


def test_each_result_is_kept_when_it_is_there_and_asked_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(model, label, wanted, servers):
        for benchmark in wanted:
            asked.append(f"{label}: {benchmark.name}")
            if len(asked) == 2:
                raise KeyboardInterrupt
            yield benchmark, result("/a/path")

    with FrontierFolder(tmp_path) as folder, pytest.raises(KeyboardInterrupt):
        ask_benchmarks(folder, "a", tmp_path, [MATH, AIME], ask, here)
    with FrontierFolder(tmp_path) as folder:
        assert missing_benchmarks(folder, "a", [MATH, AIME]) == [AIME]
        assert ask_benchmarks(folder, "a", tmp_path, [MATH, AIME], ask, here) is None
        assert ask_benchmarks(folder, "a", tmp_path, [MATH, AIME], ask, here) is None
    assert asked == ["a: math", "a: aime", "a: aime"]
    kept = FrontierFolder(tmp_path)
    assert [each["benchmark"] for each in kept.benchmarks] == ["math", "aime"]
    found = kept.benchmark("a", "math")
    assert found is not None
    assert EvalResult.from_dict(found["result"]) == result("a")
    assert found["asked"] == MATH.asked
    assert kept.benchmark("b", "math") is None


def test_why_a_benchmark_was_not_measured_is_returned_and_what_was_is_kept(tmp_path: Path) -> None:
    def ask(model, label, wanted, servers):
        yield MATH, result(label)
        raise RacError("the server is gone")

    with FrontierFolder(tmp_path) as folder:
        assert (
            ask_benchmarks(folder, "a", tmp_path, [MATH, AIME], ask, here) == "the server is gone"
        )
        assert [each["benchmark"] for each in folder.benchmarks] == ["math"]


def test_results_that_were_asked_otherwise_are_refused(tmp_path: Path) -> None:
    with FrontierFolder(tmp_path) as folder:
        ask_benchmarks(
            folder,
            "a",
            tmp_path,
            [MATH],
            lambda model, label, *_: iter([(MATH, result(label))]),
            here,
        )
        check_benchmarks(folder, [MATH, AIME])
        with pytest.raises(
            RacError, match="results of math that were asked with another cap, seed;"
        ):
            check_benchmarks(folder, [AIME, Benchmark("math", {"cap": 8, "samples": 1, "seed": 2})])
