"""A grid row by row: what is finished is not done again, wherever the run was stopped."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation.results import EvalResult, Row
from rac_modifier.evaluation.stopping import Ending
from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.frontier.measure import HeldOut
from rac_modifier.frontier.run import Tools, run_grid
from rac_modifier.problems.source import Problem
from rac_modifier.settings.grid import PlannedRow
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

HELD_OUT = HeldOut(
    [Problem(str(i), f"{i}?", "3", None) for i in range(3)],
    SamplingSettings(temperature=0.0, top_k=0, max_new_tokens=6),
)


def planned(label: str, **recipe: object) -> PlannedRow:
    return PlannedRow(label, label, "sparse", None, {"recipe": label, **recipe})


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

    def run(self, rows=ROWS, **options) -> list[dict]:
        with FrontierFolder(self.out) as folder:
            folder.begin({"model": "tiny"})
            run_grid(folder, rows, HELD_OUT, options.pop("tools", self.tools()), **options)
        return FrontierFolder(self.out).rows


@pytest.fixture
def bench(tmp_path, tiny_folder) -> Bench:
    return Bench(tmp_path, tiny_folder)


def comparable(rows: list[dict]) -> list[dict]:
    """Rows without what depends on the clock."""
    rows = json.loads(json.dumps(rows))
    for row in rows:
        for part in (row, row["accuracy"], row["divergence"] or {}):
            part.pop("seconds", None)
        row.pop("compressing")
        row["accuracy"].pop("tokens_per_second")
    return rows


def test_every_row_is_compressed_and_measured_once(bench):
    rows = bench.run()
    assert [row["label"] for row in rows] == ["dense", "a", "b", "c"]
    compressed = [step for step in bench.did if "compress" in step]
    assert compressed == ["compress a", "compress b", "compress c"]
    dense, a, *_ = rows
    assert dense["divergence"] is None
    assert a["divergence"]["kl"] > 0
    assert a["recipe"] == {"recipe": "a"}
    assert a["bytes"]["total"] == dense["bytes"]["total"] > 0
    assert a["paired"]["first"] == "dense"
    assert a["served"] is None
    bench.did.clear()
    assert bench.run() == rows
    assert bench.did == []


@pytest.fixture(scope="module")
def undisturbed(tiny_folder, tmp_path_factory) -> list[dict]:
    return comparable(Bench(tmp_path_factory.mktemp("undisturbed"), tiny_folder).run(ROWS[:2]))


@pytest.mark.parametrize("step", ["load dense", "compress a", "load a"])
def test_a_run_that_is_stopped_anywhere_ends_as_an_undisturbed_one(bench, undisturbed, step):
    bench.stop_at = step
    with pytest.raises(KeyboardInterrupt):
        bench.run(ROWS[:2])
    assert comparable(bench.run(ROWS[:2])) == undisturbed
    # what was compressed is not compressed again
    assert sum("compress" in did for did in bench.did) == 2 + step.startswith("compress")


def test_a_new_row_is_added_and_a_changed_one_is_refused(bench):
    bench.run(ROWS[:1])
    added = planned("b", store=str(bench.dense / "traces.jsonl"))
    rows = bench.run([added])
    assert [row["label"] for row in rows] == ["dense", "a", "b"]
    assert rows[2]["recipe"]["store"] == "traces.jsonl", "no path of this machine"
    assert bench.run([added]) == rows
    with pytest.raises(
        RacError, match="rows that were run with another recipe: a; give the new ones another label"
    ):
        bench.run([planned("a", sparsity=0.6), planned("d")])
    assert "compress d" not in bench.did


def test_a_checkpoint_of_another_recipe_is_not_measured(bench):
    """The run is stopped between compressing and measuring, and the grid changes."""
    bench.stop_at = "load a"
    with pytest.raises(KeyboardInterrupt):
        bench.run([planned("a", sparsity=0.5)])
    bench.did.clear()
    refused = "is not known to be compressed with the recipe of 'a'; remove it, or give the row"
    with pytest.raises(RacError, match=refused):
        bench.run([planned("b"), planned("a", sparsity=0.7)])
    assert bench.did == []
    (model,) = (bench.out / "models").iterdir()
    recipe = (model / "frontier_recipe.json").read_bytes()
    (model / "frontier_recipe.json").unlink()  # as of an earlier version
    with pytest.raises(RacError, match=refused):
        bench.run([planned("a", sparsity=0.5)])
    (model / "frontier_recipe.json").write_bytes(recipe)
    _, row = bench.run([planned("a", sparsity=0.5)])
    assert row["recipe"] == {"recipe": "a", "sparsity": 0.5}
    assert bench.did == ["load a", "load dense"]


def result(label: str) -> EvalResult:
    rows = [Row("p", None, True, Ending("right", 2, 2, True))]
    sampling = SamplingSettings(max_new_tokens=9, temperature=0.6)
    return EvalResult.of(rows, label=label, seconds=1.0, sampling=sampling)


def test_a_compressed_model_that_cannot_be_served_has_a_reason_and_a_dense_one_stops_the_run(bench):
    """The dense model is served before it is loaded: it would not fit next to its own server."""
    broken = {"dense"}

    def serve(folder: Path, label: str) -> EvalResult:
        if label in broken:
            raise RacError("vllm serve stopped:\nline 1")
        bench.did.append(f"serve {label}")
        return result(label)

    tools = replace(bench.tools(), serve=serve)
    with pytest.raises(RacError, match="the dense model cannot be served: vllm serve stopped"):
        bench.run(ROWS[:1], tools=tools)
    assert bench.did == []
    broken = {"a"}
    dense, a, _ = bench.run(ROWS[:2], tools=tools, remove_models=True)
    assert dense["served"]["tokens_per_second"] > 0
    assert a["served"] == {"not_measured": "vllm serve stopped:\nline 1"}
    assert bench.did[:2] == ["serve dense", "load dense"]
    assert bench.did[-4:] == ["compress b", "serve b", "load b", "load dense"]
    assert list((bench.out / "models").iterdir()) == []
