"""What another run has pruned is refused by name and left alone: a killed run goes on only as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from rac_modifier import RacError
from rac_modifier.llmcompressor import finished_groups
from rac_modifier.llmcompressor.finished_groups import FinishedGroups
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.collect import collect_traces
from tests.llmcompressor.unfinished_runs import Killed, everything, written
from tests.tiny import entry


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


@pytest.mark.parametrize(
    ("change", "says"), CHANGES.items(), ids=lambda of: getattr(of, "__name__", "")
)
def test_a_killed_run_goes_on_only_as_it_was(
    prune, solved, stopped, dense, tmp_path, monkeypatch, change, says
):
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
