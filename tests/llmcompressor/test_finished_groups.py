"""A run that is killed goes on after the last groups that it wrote, and ends with the weights of an undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rac_modifier import RacError
from rac_modifier.llmcompressor import finished_groups, solving
from rac_modifier.llmcompressor.finished_groups import FinishedGroups
from tests import forked
from tests.llmcompressor import killed_runs
from tests.tiny import entry, recipe

GROUPS = 8  # four in each of the tiny model's two layers


@pytest.fixture
def at_once(monkeypatch):
    """Each group is written as soon as it is pruned."""
    monkeypatch.setattr(finished_groups, "_SAVE_SECONDS", 0.0)


class Killed(BaseException):
    """Ends a run as a kill does, as far as it matters here: nothing more is pruned or written."""


@pytest.fixture
def solved(monkeypatch):
    """The names of each group that is solved; after `solved.lives` of them a run dies."""

    class Solved(list):
        lives = 10**6

    groups, solve = Solved(), solving.solve_many

    def counted(method: Any, problems: Any, **kwargs: Any) -> Any:
        if groups.lives == 0:
            raise Killed
        groups.lives -= 1
        groups.extend(problem.names for problem in problems)
        return solve(method, problems, **kwargs)

    monkeypatch.setattr(solving, "solve_many", counted)
    return groups


def result(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Of a saved checkpoint, the record without its times, and the bytes of its weights."""
    record = json.loads((folder / "rac_run.json").read_text())
    record.pop("time")
    for part in record.get("recovery", {}), record:
        part.pop("seconds", None), part.pop("cpu_seconds", None)
    return record, {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


SETTINGS = {
    "dense target": {},
    "int4": {
        "quantization": {"config_groups": {"all": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}}}
    },
    "layer by layer": {"preset": "paper"},
    "recovered int8": {
        "quantization": {"config_groups": {"all": {"weights": {"num_bits": 8, "strategy": "channel"}}}},
        "recover": {"tokens": 300, "held_out_tokens": 100, "step_tokens": 128},
    },
}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_goes_on_where_it_was_killed(prune, solved, tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    prune(output_dir=tmp_path / "undisturbed", **settings)
    assert len(solved) == GROUPS
    assert not (tmp_path / "undisturbed.unfinished").exists()
    expected = list(solved)
    solved.clear()
    solved.lives = 5
    with pytest.raises(Killed):
        prune(output_dir=tmp_path / "killed", **settings)
    solved.lives = 10**6
    prune(output_dir=tmp_path / "killed", **settings)
    whole = 4 if "preset" in settings else 5  # layer by layer, only a whole layer counts
    assert solved == expected[:5] + expected[whole:]
    assert result(tmp_path / "killed") == result(tmp_path / "undisturbed")
    assert list(tmp_path.glob("killed.unfinished*")) == []


def test_groups_are_written_now_and_then(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(finished_groups.time, "monotonic", lambda: now[0])
    groups = FinishedGroups(tmp_path / "state", {})
    groups.begin({})
    for number, module in enumerate(modules()):
        now[0] += 16.0
        groups.add({str(number): module}, {str(number): {"error": number}}, {})
    held = sorted((tmp_path / "state").glob("*.safetensors"))
    assert [sorted(load_file(file)) for file in held] == [["0.weight", "1.weight"], ["2.weight", "3.weight"]]
    again = FinishedGroups(tmp_path / "state", {})
    assert not again.has(["0"])
    again.begin({})
    assert again.has(["0", "3"])
    assert not again.has(["3", "4"])
    module = torch.nn.Linear(3, 2, bias=False)
    masters: dict[str, torch.Tensor] = {}
    assert again.restore("2", module, masters) == {"error": 2}
    assert not masters
    assert torch.equal(module.weight, modules()[2].weight)


@pytest.mark.usefixtures("at_once")
def test_no_file_is_overwritten_where_others_are_missing(tmp_path):
    folder = tmp_path / "state"
    groups = FinishedGroups(folder, {})
    groups.begin({})
    for number, module in enumerate(modules()[:3]):
        groups.add({str(number): module}, {str(number): {}}, {})
    (folder / "group-00000.safetensors").unlink()
    again = FinishedGroups(folder, {})
    again.begin({})
    again.add({"3": modules()[3]}, {"3": {}}, {})
    last = FinishedGroups(folder, {})
    last.begin({})
    assert [last.has([str(number)]) for number in range(4)] == [False, True, True, True]


def modules() -> list[torch.nn.Linear]:
    torch.manual_seed(0)
    return [torch.nn.Linear(3, 2, bias=False) for _ in range(5)]


def written(folder: Path, about: dict[str, Any]) -> Path:
    groups = FinishedGroups(folder, about)
    groups.begin({"calibration set": "a"})
    groups.add({"m": modules()[0]}, {"m": {}}, {})
    return next(folder.glob("*.safetensors"))


@pytest.mark.usefixtures("at_once")
def test_what_another_run_has_pruned_is_refused_and_left_alone(tmp_path):
    about = {"recipe": {"sparsity": 0.5, "calibration": {"tokens": 100}}, "model": "f" * 64}
    file = written(tmp_path / "state", about)
    other = {**about, "recipe": {"sparsity": 0.6, "calibration": {"tokens": 100}}}
    with pytest.raises(RacError, match=r"another recipe .*\(sparsity: 0.5 there, 0.6 here\); .*remove the folder"):
        FinishedGroups(tmp_path / "state", other)
    with pytest.raises(RacError, match="another model has pruned; "):
        FinishedGroups(tmp_path / "state", {**about, "model": "e" * 64})
    with pytest.raises(RacError, match=r"another calibration set has pruned \('a' there, 'b' here\)"):
        FinishedGroups(tmp_path / "state", about).begin({"calibration set": "b"})
    assert load_file(file).keys() == {"m.weight"}


@pytest.mark.usefixtures("at_once")
def test_another_recipe_is_refused_before_anything_is_sampled(prune, solved, tmp_path):
    solved.lives = 2
    with pytest.raises(Killed):
        prune(output_dir=tmp_path / "out")
    with pytest.raises(RacError, match=r"out\.unfinished holds .*dampening_frac: 0.01 there, 0.02 here"):
        prune(output_dir=tmp_path / "out", dampening_frac=0.02, traces={"store": str(tmp_path / "new.jsonl")})
    assert not (tmp_path / "new.jsonl").exists()
    assert len(list((tmp_path / "out.unfinished").glob("*.safetensors"))) == 2


@pytest.mark.usefixtures("at_once")
def test_a_full_disk_loses_nothing(prune, solved, tmp_path, monkeypatch):
    prune(output_dir=tmp_path / "undisturbed")
    solved.clear()
    calls = []

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        calls.append(path)
        if len(calls) == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(finished_groups, "save_file", full)
    with pytest.raises(
        RacError, match=r"out\.unfinished: what is pruned so far cannot be kept .*No space left.*make room"
    ):
        prune(output_dir=tmp_path / "out")
    assert len(list((tmp_path / "out.unfinished").iterdir())) == 3 + 1  # and about.json
    prune(output_dir=tmp_path / "out")
    assert len(solved) == 4 + GROUPS - 3
    assert result(tmp_path / "out") == result(tmp_path / "undisturbed")


def test_a_place_that_cannot_be_written_is_refused_at_the_start(prune, tmp_path):
    (tmp_path / "out.unfinished").write_text("a file")
    with pytest.raises(RacError, match=r"out\.unfinished is not a folder that can be written to"):
        prune(output_dir=tmp_path / "out", traces={"store": str(tmp_path / "new.jsonl")})
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.usefixtures("at_once")
def test_a_damaged_file_is_named(tmp_path):
    file = written(tmp_path / "state", {})
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    with pytest.raises(RacError, match=r"group-00000\.safetensors: cannot be read .*remove .*state to start anew"):
        FinishedGroups(tmp_path / "state", {}).begin({"calibration set": "a"})
    file.write_bytes(whole)
    groups = FinishedGroups(tmp_path / "state", {})
    groups.begin({"calibration set": "a"})
    with pytest.raises(RacError, match=r"m\.weight has the shape \(2, 3\)"):
        groups.restore("m", torch.nn.Linear(4, 2), {})


@pytest.mark.slow
def test_twenty_kills_change_nothing(tiny_folder, trace_store, tmp_path):
    """SIGKILL at random times, also while a group is being written; every start is a process of its own."""
    (tmp_path / "recipe.yaml").write_text(recipe(entry(trace_store)))
    ran = forked.run(killed_runs.main, [str(tiny_folder), "recipe.yaml", "20"], tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["kills"] == 20
    assert found["resumed"] >= 5, "hardly any start found groups of an earlier one: the test shows nothing"
    assert result(tmp_path / "killed") == result(tmp_path / "undisturbed")
    assert list(tmp_path.glob("killed.unfinished*")) == []
