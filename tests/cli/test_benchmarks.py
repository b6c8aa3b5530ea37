"""The benchmarks of a grid as `rac eval --preset` would ask them, of one server per model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rac_modifier.cli.benchmarks import AskedBenchmarks, digest_of, protocol_of
from rac_modifier.cli.frontier import _served
from rac_modifier.cli.options import Dtype
from rac_modifier.errors import RacError
from rac_modifier.problems.source import Problem
from rac_modifier.settings.grid import GridBenchmark, GridEvaluation
from rac_modifier.settings.sampling import PromptSettings
from tests.sampling import fake_vllm
from tests.sampling.fake_server import shorten_pauses


def test_what_is_not_set_is_as_published() -> None:
    protocol = protocol_of(GridBenchmark(preset="math-500"))
    assert (protocol.source, protocol.problems, protocol.samples, protocol.cap) == (
        "HuggingFaceH4/MATH-500", None, 4, 32768,
    )  # fmt: skip
    assert protocol.changed == {}
    changed = protocol_of(
        GridBenchmark(preset="math-500", samples=1, problems=20, source="copy.jsonl")
    )
    assert (changed.source, changed.problems, changed.samples, changed.cap) == (
        "copy.jsonl",
        20,
        1,
        32768,
    )
    assert changed.changed == {"source": "HuggingFaceH4/MATH-500", "samples": 4, "problems": 500}
    with pytest.raises(RacError, match="no preset 'math'; use one of"):
        protocol_of(GridBenchmark(preset="math"))


def test_a_changed_answer_is_another_list_of_problems() -> None:
    one, other = (Problem("a", "q?", answer, None) for answer in "12")
    assert digest_of([one]) != digest_of([other])


@pytest.fixture
def asked(tmp_path: Path) -> AskedBenchmarks:
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    (tmp_path / "copy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {"source": str(tmp_path / "copy.jsonl"), "samples": 2, "cap": 6}
    evaluation = GridEvaluation(
        serve=True,
        concurrency=3,
        problems=2,
        cap=6,
        benchmarks=[{"preset": "math-500", **small}, {"preset": "aime24", **small}],
    )
    return AskedBenchmarks(evaluation, PromptSettings(), Dtype.FLOAT32, tmp_path / "out")


def test_what_is_asked_is_written_down_without_paths(
    asked: AskedBenchmarks, tmp_path: Path
) -> None:
    math, aime = asked.listed
    assert (math.name, aime.name) == ("math-500", "aime24")
    assert (math.asked["source"], math.asked["samples"], math.asked["max_new_tokens"]) == (
        "copy.jsonl",
        2,
        6,
    )
    assert str(tmp_path) not in json.dumps(math.asked)


def test_one_server_is_timed_and_answers_all_benchmarks_of_a_model_and_answers_are_kept(
    asked: AskedBenchmarks, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAC_VLLM", str(fake_vllm.install(tmp_path)))
    shorten_pauses(monkeypatch)
    tools = _served(asked.evaluation, asked.prompt, asked.precision, asked.out)
    with tools["servers"](tiny_folder) as servers:
        assert tools["serve"](tiny_folder, "2:4", servers).problems == 2
        results = {
            benchmark.name: result
            for benchmark, result in asked.ask(tiny_folder, "2:4", asked.listed, servers)
        }
    assert list(results) == ["math-500", "aime24"]
    assert all((result.problems, result.samples) == (3, 2) for result in results.values())
    assert [start["argv"][1] for start in fake_vllm.starts(tmp_path)] == [str(tiny_folder)]
    assert fake_vllm.left_over(tmp_path) == []
    kept = sorted(
        path.name.rpartition("-")[2] for path in (tmp_path / "out" / "benchmarks").glob("*.jsonl")
    )
    assert kept == ["500.jsonl", "aime24.jsonl"]
