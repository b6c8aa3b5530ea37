"""A run that is killed goes on after the last groups that it wrote, and ends with the weights of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rac_modifier import RacError
from rac_modifier.llmcompressor import finished_groups, solving
from rac_modifier.llmcompressor.finished_groups import FinishedGroups
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.collect import collect_traces
from tests import forked
from tests.llmcompressor import killed_runs
from tests.tiny import entry, linears, recipe

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


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What is in a folder, and when it was written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


@pytest.fixture
def stopped(prune, solved, tmp_path, trace_store, at_once):
    """Two groups of a run with a trace store of its own; after them it was killed."""
    shutil.copy(trace_store, tmp_path / "own.jsonl")
    solved.lives = 2
    with pytest.raises(Killed):
        prune(output_dir=tmp_path / "out", traces=entry(tmp_path / "own.jsonl")["traces"])
    solved.lives = 10**6
    found = everything(tmp_path / "out.unfinished")
    assert len(found) == 2 + 1  # and about.json
    return found


def another_model(dense: Any, folder: Path) -> dict[str, Any]:
    with torch.no_grad():
        dense.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(1.01)
    return {"model": dense}


def another_recipe(dense: Any, folder: Path) -> dict[str, Any]:
    return {"mask_structure": None, "sparsity": 0.6}


def another_store(dense: Any, folder: Path) -> dict[str, Any]:
    """The same file, to which another run has added traces."""
    settings = TraceSettings(**entry()["traces"])
    tokenizer = AutoTokenizer.from_pretrained(dense.config.name_or_path)
    how = {"problems": settings.problems, "sampling": settings.sampling, "progress": False}
    collect_traces(dense, tokenizer, folder / "own.jsonl", tokens=6000, **how)
    return {}


def another_torch(dense: Any, folder: Path) -> dict[str, Any]:
    real = finished_groups.version
    finished_groups.version = lambda name: "1.0" if name == "torch" else real(name)
    return {}


def more_threads(dense: Any, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(torch.get_num_threads() + 1)
    return {}


CHANGES = {
    another_model: "holds what a run with another model has pruned; start that run again",
    another_recipe: r"holds what a run with another recipe has pruned \(.*sparsity: None there, 0\.6 here",
    another_store: r"another calibration set has pruned, since a trace store is another one \(traces: .*own\.jsonl sha256 .*now",
    another_torch: r"was begun with torch \d\S+, now 1\.0, and .*use the same, or remove the folder to start again",
    more_threads: r"was begun with threads \(OMP_NUM_THREADS\) \d+, now \d+, and .*use the same",
}


@pytest.mark.parametrize(("change", "says"), CHANGES.items(), ids=lambda of: getattr(of, "__name__", ""))
def test_a_killed_run_goes_on_only_as_it_was(prune, solved, stopped, dense, tmp_path, monkeypatch, change, says):
    """Changed, it is refused by name, before anything is pruned, and no file is touched; as it was, it goes on."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(finished_groups, "version", finished_groups.version)
    solved.clear()
    try:
        settings = {"traces": entry(tmp_path / "own.jsonl")["traces"], **change(dense, tmp_path)}
        with pytest.raises(RacError, match=says) as caught:
            prune(output_dir=tmp_path / "out", **settings)
    finally:
        torch.set_num_threads(threads)
    assert str(caught.value).startswith(str(tmp_path / "out.unfinished"))
    assert not solved
    assert everything(tmp_path / "out.unfinished") == stopped
    assert not (tmp_path / "out").exists()
    if change is not another_store:
        monkeypatch.undo()
        prune(output_dir=tmp_path / "out", traces=entry(tmp_path / "own.jsonl")["traces"])
        assert (tmp_path / "out" / "rac_run.json").exists()


def as_another_user(run: Callable[[], Any]) -> str:
    """What `run` raises in a fork that is not root, for whom permissions do not count."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing"
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            run()
        except RacError as error:
            said = str(error)
        except BaseException:
            said = traceback.format_exc()
        finally:
            os.write(writes, said.encode())
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said


@pytest.fixture
def open_folder():
    """A folder that every user can reach, unlike those of pytest; its content may be made read-only."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_folder_is_refused_at_the_start(prune, tiny_folder, open_folder):
    """Before anything is sampled: the trace store that is named could not be written either, and is not what is complained of."""
    model, place = open_folder / "model", open_folder / "results"
    shutil.copytree(tiny_folder, model)
    for path in (model, *model.iterdir()):
        path.chmod(0o755)
    place.mkdir()
    place.chmod(0o555)
    said = as_another_user(
        lambda: prune(model=str(model), output_dir=place / "out", traces=entry(place / "new.jsonl")["traces"])
    )
    assert said.startswith(
        f"{place / 'out.unfinished'}: what is pruned so far cannot be kept there ({place} is not a folder that"
    )
    assert "name another output_dir" in said
    assert list(place.iterdir()) == []


@pytest.mark.usefixtures("at_once")
def test_a_folder_that_became_read_only_keeps_what_is_there(open_folder):
    folder = open_folder / "out.unfinished"
    file = written(folder, {})
    file.chmod(0o644)
    before = everything(folder)
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)

    def run() -> None:
        groups = FinishedGroups(folder, {})
        groups.begin({"calibration set": "a"})
        folder.chmod(0o555)
        groups.add({"other": modules()[1]}, {"other": {}}, {})

    said = as_another_user(run)
    assert "what is pruned so far cannot be kept there (" in said
    assert "Permission denied" in said
    assert "goes on from the groups that were written" in said
    assert everything(folder) == before


def test_the_disk_is_checked_before_anything_is_sampled(prune, dense, tmp_path, monkeypatch):
    """Twice the model for the checkpoint, and once what is pruned; with codes to train also its float32 weights."""
    whole = sum(p.numel() * 4 for p in dense.parameters())
    groups = sum(m.weight.numel() * 4 for m in linears(dense).values())
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free[0]))
    store = {"traces": {"store": str(tmp_path / "new.jsonl")}}
    for settings, needed in (({}, 2 * whole + groups), (SETTINGS["recovered int8"], 2 * whole + 2 * groups)):
        free[0] = needed - 1
        with pytest.raises(
            RacError, match=r"out: 0\.0 GiB are free, the checkpoint needs .* what is pruned so far up to"
        ):
            prune(output_dir=tmp_path / "out", **settings, **store)
        assert not (tmp_path / "new.jsonl").exists()
        free[0] = needed
        modules = linears(dense).values()
        finished_groups.check_disk(tmp_path / "out", dense, modules, masters="recover" in settings)


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
