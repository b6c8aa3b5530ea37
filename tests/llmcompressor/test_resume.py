"""What a run that was killed goes on from, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rac_modifier import RacError
from rac_modifier.llmcompressor import resume
from rac_modifier.llmcompressor.resume import FinishedGroups
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.store import TraceStore
from tests import forked
from tests.llmcompressor import killed_runs
from tests.llmcompressor.unfinished_runs import (
    GROUPS,
    RECOVERED,
    Killed,
    everything,
    modules,
    result,
    written,
)
from tests.tiny import entry, recipe

SETTINGS = {
    "dense target": {},
    "int4": {
        "quantization": {
            "config_groups": {
                "all": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
            }
        }
    },
    "layer by layer": {"preset": "paper"},
    "recovered int8": RECOVERED,
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
    monkeypatch.setattr(resume.time, "monotonic", lambda: now[0])
    groups = FinishedGroups(tmp_path / "state", {})
    groups.begin({})
    for number, module in enumerate(modules()):
        now[0] += 16.0
        groups.add({str(number): module}, {str(number): {"error": number}}, {})
    held = sorted((tmp_path / "state").glob("*.safetensors"))
    assert [sorted(load_file(file)) for file in held] == [
        ["0.weight", "1.weight"],
        ["2.weight", "3.weight"],
    ]
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
def test_a_damaged_file_is_named(tmp_path):
    file = written(tmp_path / "state", {})
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    with pytest.raises(
        RacError, match=r"group-00000\.safetensors: cannot be read .*remove .*state to start anew"
    ):
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
    assert found["resumed"] >= 5, (
        "hardly any start found groups of an earlier one: the test shows nothing"
    )
    assert result(tmp_path / "killed") == result(tmp_path / "undisturbed")
    assert list(tmp_path.glob("killed.unfinished*")) == []


@pytest.mark.usefixtures("at_once")
def test_what_another_run_has_pruned_is_refused_and_left_alone(tmp_path):
    about = {"recipe": {"sparsity": 0.5, "calibration": {"tokens": 100}}, "model": "f" * 64}
    file = written(tmp_path / "state", about)
    other = {**about, "recipe": {"sparsity": 0.6, "calibration": {"tokens": 100}}}
    with pytest.raises(
        RacError, match=r"another recipe .*\(sparsity: 0.5 there, 0.6 here\); .*remove the folder"
    ):
        FinishedGroups(tmp_path / "state", other)
    with pytest.raises(RacError, match="another model has pruned; "):
        FinishedGroups(tmp_path / "state", {**about, "model": "e" * 64})
    with pytest.raises(
        RacError, match=r"another calibration set has pruned \('a' there, 'b' here\)"
    ):
        FinishedGroups(tmp_path / "state", about).begin({"calibration set": "b"})
    assert load_file(file).keys() == {"m.weight"}


@pytest.mark.usefixtures("at_once")
def test_another_recipe_is_refused_before_anything_is_sampled(prune, solved, tmp_path):
    solved.lives = 2
    with pytest.raises(Killed):
        prune(output_dir=tmp_path / "out")
    with pytest.raises(
        RacError, match=r"out\.unfinished holds .*dampening_frac: 0.01 there, 0.02 here"
    ):
        prune(
            output_dir=tmp_path / "out",
            dampening_frac=0.02,
            traces={"store": str(tmp_path / "new.jsonl")},
        )
    assert not (tmp_path / "new.jsonl").exists()
    assert len(list((tmp_path / "out.unfinished").glob("*.safetensors"))) == 2


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
    store = folder / "own.jsonl"
    held = sum(len(t.prompt_ids) + len(t.completion_ids) for t in TraceStore.read(store))
    collect_traces(dense, tokenizer, store, tokens=held + 1000, **how)
    return {}


def another_torch(dense: Any, folder: Path) -> dict[str, Any]:
    real = resume.version
    resume.version = lambda name: "1.0" if name == "torch" else real(name)
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


@pytest.mark.parametrize(
    ("change", "says"), CHANGES.items(), ids=lambda of: getattr(of, "__name__", "")
)
def test_a_killed_run_goes_on_only_as_it_was(
    prune, solved, stopped, dense, tmp_path, monkeypatch, change, says
):
    """Changed, it is refused by name, before anything is pruned, and no file is touched; as it was, it goes on."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(resume, "version", resume.version)
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
