"""A grid row by row: what is finished is not done again, wherever the run was stopped."""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from rac_modifier.frontier.benchmarks import Benchmark
from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.frontier.measure import HeldOut
from rac_modifier.frontier.run import Tools, run_grid
from rac_modifier.problems.source import Problem
from rac_modifier.settings.grid import PlannedRow
from rac_modifier.settings.sampling import SamplingSettings
from tests.frontier.test_benchmarks import result
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

HELD_OUT = HeldOut(
    [Problem(str(i), f"{i}?", "3", None) for i in range(3)],
    SamplingSettings(temperature=0.0, top_k=0, max_new_tokens=6),
)


def planned(label: str, **recipe: object) -> PlannedRow:
    return PlannedRow(label, label, "sparse", None, {"recipe": label, **recipe}, (), frozenset())


ROWS = [planned("a"), planned("b"), planned("c")]


class Bench:
    """Tools on tiny models that count what is done. `stop_at` names a step at which the run is
    interrupted once."""

    def __init__(self, tmp: Path, dense: Path):
        self.out, self.dense, self.did, self.stop_at = tmp / "out", dense, [], ""

    def tools(self) -> Tools:
        return Tools(self.dense, self.load, self.compress)

    def step(self, name: str) -> None:
        self.did.append(name)
        if name == self.stop_at:
            self.stop_at = ""
            raise KeyboardInterrupt

    def load(self, folder: Path):
        self.step(f"load {'dense' if folder == self.dense else folder.name[0]}")
        return tiny_model(0 if folder == self.dense else 1), tiny_tokenizer()

    def compress(self, recipe, folder: Path) -> None:
        folder.mkdir()  # as oneshot, it refuses a folder that is not empty
        (folder / "half").touch()
        self.step(f"compress {recipe['recipe']}")
        save_tiny(folder)
        modules = [{"name": "m", "relative_error": 0.1, "sparsity": 0.5}]
        (folder / "rac_run.json").write_text(
            json.dumps({"modules": modules, "calibration": {"tokens": 9}})
        )

    def run(self, rows=ROWS, **options) -> list[dict]:
        with FrontierFolder(self.out) as folder:
            folder.begin({"model": "tiny"})
            run_grid(folder, rows, HELD_OUT, options.pop("tools", self.tools()), **options)
        return FrontierFolder.read(self.out).rows


@pytest.fixture
def bench(tmp_path: Path, tiny_folder: Path) -> Bench:
    return Bench(tmp_path, tiny_folder)


def comparable(rows: list[dict]) -> list[dict]:
    """Rows without what depends on the clock."""
    text = json.dumps(rows)
    rows = json.loads(text)
    for row in rows:
        for part in (row, row["accuracy"], row["divergence"] or {}):
            part.pop("seconds", None)
        row.pop("compressing")
        row["accuracy"].pop("tokens_per_second")
    return rows


def test_every_row_is_compressed_and_measured_once(bench: Bench) -> None:
    said: list[str] = []
    rows = bench.run(report=lambda row: said.append(row["label"]))
    assert [row["label"] for row in rows] == said == ["dense", "a", "b", "c"]
    assert [step for step in bench.did if "compress" in step] == [
        "compress a",
        "compress b",
        "compress c",
    ]
    dense, a, *_ = rows
    assert dense["divergence"] is None
    assert a["divergence"]["kl"] > 0
    assert a["layers"] == {"m": {"error": 0.1, "sparsity": 0.5}}
    assert a["calibration"] == {"tokens": 9}
    assert a["recipe"] == {"recipe": "a"}
    assert a["bytes"]["total"] == dense["bytes"]["total"] > 0
    assert a["paired"]["first"] == "dense"
    assert a["served"] is None
    bench.did.clear()
    assert bench.run() == rows
    assert bench.did == []


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return comparable(Bench(tmp_path_factory.mktemp("undisturbed"), tiny_folder).run(ROWS[:2]))


@pytest.mark.parametrize("step", ["load dense", "compress a", "load a", "compress b"])
def test_a_run_that_is_stopped_anywhere_ends_as_an_undisturbed_one(
    bench: Bench, undisturbed, step: str
) -> None:
    bench.stop_at = step
    with pytest.raises(KeyboardInterrupt):
        bench.run(ROWS[:2])
    assert comparable(bench.run(ROWS[:2])) == undisturbed
    # what was compressed is not compressed again
    assert sum("compress" in did for did in bench.did) == 2 + step.startswith("compress")


def test_a_new_row_is_added_and_a_changed_one_is_refused(bench: Bench) -> None:
    bench.run(ROWS[:1])
    assert [row["label"] for row in bench.run([ROWS[1]])] == ["dense", "a", "b"]
    with pytest.raises(
        RacError, match="rows that were run with another recipe: a; give the new ones another label"
    ):
        bench.run([planned("a", sparsity=0.6), planned("d")])
    assert "compress d" not in bench.did


def test_paths_of_this_machine_are_not_written_down(bench: Bench) -> None:
    (row,) = bench.run([planned("a", store=str(bench.dense / "traces.jsonl"))])[1:]
    assert row["recipe"]["store"] == "traces.jsonl"
    assert bench.run([planned("a", store=str(bench.dense / "traces.jsonl"))])[1:] == [row]


def test_a_compressed_model_that_cannot_be_served_has_a_reason_and_a_dense_one_stops_the_run(
    bench: Bench,
) -> None:
    broken = {"dense"}

    def serve(folder: Path, label: str, servers):
        if label in broken:
            lines = "\n".join(f"line {number}" for number in range(9))
            raise RacError(f"vllm serve stopped:\n{lines}")
        return result(label)

    tools = replace(bench.tools(), serve=serve)
    with pytest.raises(RacError, match="the dense model cannot be served: vllm serve stopped"):
        bench.run(ROWS[:1], tools=tools)
    assert bench.did == []
    broken.clear()
    broken.add("a")
    dense, a = bench.run(ROWS[:1], tools=tools)
    names = ["tokens_per_second", "accuracy", "ci_low", "ci_high", "seconds"]
    assert list(dense["served"]) == names
    assert a["served"] == {"not_measured": "vllm serve stopped:\nline 6\nline 7\nline 8"}


def test_benchmarks_are_asked_per_model_and_one_that_fails_stops_no_other(bench: Bench) -> None:
    asked: list[str] = []
    broken = {"a"}

    def ask(model: Path, label: str, wanted, servers):
        asked.append(f"{label} of {model.name.partition('-')[0]}")
        for benchmark in wanted:
            if label in broken:
                raise RacError("no kernel reads 3 bits")
            yield benchmark, result(label)

    tools = replace(bench.tools(), benchmarks=[Benchmark("math", {"cap": 9})], ask=ask)
    with pytest.raises(
        RacError,
        match=r"not all benchmarks; run the same command again .*\n- a: no kernel reads 3 bits$",
    ):
        bench.run(ROWS[:2], tools=tools, remove_models=True)
    assert asked == [f"dense of {bench.dense.name}", "a of a", "b of b"]
    assert [path.name[0] for path in (bench.out / "models").iterdir()] == ["a"], (
        "b was measured, a is still needed"
    )
    broken.clear()
    asked.clear()
    bench.run(ROWS[:2], tools=tools, remove_models=True)
    assert asked == ["a of a"]
    assert list((bench.out / "models").iterdir()) == []
    more = replace(tools, benchmarks=[*tools.benchmarks, Benchmark("aime", {"cap": 9})])
    with pytest.raises(
        RacError, match="no checkpoint any more of a, b, so the benchmarks cannot be asked"
    ):
        bench.run(ROWS[:2], tools=more)


def test_a_server_ends_before_the_dense_model_is_loaded_and_starts_when_a_row_is_measured(
    bench: Bench,
) -> None:
    """vLLM reserves most of a device: the model would not fit beside its own server."""

    @contextmanager
    def servers(folder: Path):
        name = "dense" if folder == bench.dense else folder.name[0]
        asked: list[str] = []

        def answering():
            bench.did.extend(() if asked else [f"{name} starts"])
            asked.append(name)
            return nullcontext((name,))

        yield answering
        bench.did.extend([f"{name} ends"] if asked else ())

    def serve(folder: Path, label: str, servers):
        with servers() as urls:
            bench.did.append(f"{label} is timed on {urls}")
        return result(label)

    def ask(model: Path, label: str, wanted, servers):
        with servers() as urls:
            bench.did.append(f"{label} is asked on {urls}")
            yield wanted[0], result(label)

    tools = replace(
        bench.tools(),
        servers=servers,
        serve=serve,
        benchmarks=[Benchmark("math", {"cap": 9})],
        ask=ask,
    )
    bench.run(ROWS[:1], tools=tools, remove_models=True)

    def served(name: str) -> list[str]:
        return [
            f"{name} starts",
            f"{name} is timed on ('{name}',)",
            f"{name} is asked on ('{name}',)",
            f"{name} ends",
        ]

    assert bench.did == [
        *served("dense"),
        "load dense",
        "compress a",
        "load a",
        "load dense",
        *served("a"),
    ]
