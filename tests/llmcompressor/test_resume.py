"""What a run that was killed goes on from, what it refuses, and where it writes."""

import copy
import fcntl
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning import WandaPruningModifier
from pydantic import PrivateAttr
from safetensors.torch import save_file
from transformers import AutoTokenizer

from rac_modifier import RacError
from rac_modifier.checkpoint import files
from rac_modifier.llmcompressor import resume
from rac_modifier.runtime.files import hold
from rac_modifier.settings.calibration import TraceSettings
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.store import TraceStore
from tests.llmcompressor.conftest import Killed, record_of
from tests.llmcompressor.modifier_helpers import INT8
from tests.tiny import entry, linears

GROUPS = 8  # four in each of the tiny model's two layers
RECOVER = {"tokens": 300, "held_out_tokens": 100, "step_tokens": 128}
RECOVERED = {"quantization": INT8, "recover": RECOVER}
SETTINGS = {
    "dense target": {"solver": "sparsegpt"},
    "layer by layer": {"preset": "paper"},
    "recovered int8": {"solver": "sparsegpt", **RECOVERED},
    "NVFP4": {"solver": "none", "mask_structure": None, "quantization": {"scheme": "NVFP4A16"}},
}


def result(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the record without its times, and the hashes of the files of weights."""
    record = record_of(folder)
    record.pop("time")
    for part in record.get("recovery", {}), record["divergence"], record:
        part.pop("seconds", None), part.pop("cpu_seconds", None)
    files = sorted(folder.glob("*.safetensors"))
    return record, {file.name: sha256(file.read_bytes()).hexdigest() for file in files}


def everything(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash what is in a folder, with the time when it was written."""
    return {
        path.name: (sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.iterdir())
    }


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


@pytest.fixture
def stopped(prune, solved, tmp_path, trace_store):
    """Two groups of a run with a trace store of its own; after them it was killed."""
    shutil.copy(trace_store, tmp_path / "own.jsonl")
    solved.lives = 2
    with pytest.raises(Killed):
        prune(output_dir=tmp_path / "out", traces=entry(tmp_path / "own.jsonl")["traces"])
    solved.lives = 10**6
    files = everything(tmp_path / "out.unfinished")
    assert len(files) == 2 + 2  # and about.json and .lock
    return files


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
    store = folder / "own.jsonl"
    held = sum(len(t.prompt_ids) + len(t.completion_ids) for t in TraceStore.read(store))
    settings = settings.model_copy(update={"store": str(store)})
    collect_traces(dense, tokenizer, settings, held + 1000)
    return {}


def more_threads(dense: Any, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(torch.get_num_threads() + 1)
    return {}


CHANGES = {
    another_model: r"a run with another model has pruned; start that run again",
    another_recipe: r"a run with another recipe has pruned \(.*sparsity: None there, 0\.6 here",
    another_store: r"another calibration set has pruned \(.*traces.*own\.jsonl.* there, .* here",
    more_threads: r"threads \(OMP_NUM_THREADS\): \d+ there, \d+ here.*or remove the folder",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_killed_run_goes_on_only_as_it_was(prune, solved, stopped, dense, tmp_path, change):
    """Changed, it is refused by name, before anything is pruned, and no file is touched."""
    threads = torch.get_num_threads()
    solved.clear()
    try:
        settings = {"traces": entry(tmp_path / "own.jsonl")["traces"], **change(dense, tmp_path)}
        with pytest.raises(RacError, match=CHANGES[change]) as caught:
            prune(output_dir=tmp_path / "out", **settings)
    finally:
        torch.set_num_threads(threads)
    assert str(caught.value).startswith(str(tmp_path / "out.unfinished"))
    assert not solved
    assert everything(tmp_path / "out.unfinished") == stopped
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        ({"traces": entry("another.jsonl")["traces"]}, "another.jsonl' is no file of traces"),
        (
            {"order": "group", "oneshot_options": {"sequential_targets": ["Qwen3MLP"]}},
            "order: group is not possible",
        ),
    ],
)
def test_a_run_that_is_refused_leaves_nothing_behind(prune, tmp_path, monkeypatch, refused, why):
    """While it is prepared, or when its plan is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "another.jsonl").write_text("{}\n")
    with pytest.raises(RacError, match=why):
        prune(output_dir=tmp_path / "new" / "out", **refused)
    assert list((tmp_path / "new").iterdir()) == []


class Scaling(Modifier):
    """Scales a weight by a factor that is no setting."""

    requires_calibration_data: bool = True
    _factor: float = PrivateAttr(default=1.0)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        return True

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        with torch.no_grad():
            state.model.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(self._factor)


def scaling(factor: float) -> Scaling:
    modifier = Scaling()
    modifier._factor = factor
    return modifier


def wanda(sparsity: float) -> WandaPruningModifier:
    return WandaPruningModifier(sparsity=sparsity, targets=["Linear"], ignore=["lm_head"])


# by id: the modifiers before ours of the killed run and of the next, and why that is refused
BEFORE = {
    "removed": ([wanda(0.3)], [], r"of earlier modifiers has pruned \(WandaPruningModifier: "),
    "changed": ([wanda(0.3)], [wanda(0.2)], r"Modifier\.sparsity: '0\.3' there, '0\.2' here"),
    "weights": ([scaling(1.1)], [scaling(1.2)], r"another result of earlier modifiers has pruned;"),
}


@pytest.mark.parametrize(("first", "second", "why"), BEFORE.values(), ids=BEFORE)
def test_a_killed_run_goes_on_only_behind_the_same_modifiers(
    prune, solved, tmp_path, first, second, why
):
    """Changed before ours, it is refused before anything is pruned; the same recipe goes on."""
    out, first, second = tmp_path / "out", *copy.deepcopy((first, second))
    prune(output_dir=tmp_path / "undisturbed", earlier=copy.deepcopy(first))
    solved.clear()
    solved.lives = 2
    with pytest.raises(Killed):
        prune(output_dir=out, earlier=copy.deepcopy(first))
    solved.lives = 10**6
    with pytest.raises(RacError, match=why):
        prune(output_dir=out, earlier=second)
    assert len(solved) == 2
    prune(output_dir=out, earlier=first)
    assert len(solved) == GROUPS
    assert result(out) == result(tmp_path / "undisturbed")


# two runs at once

IN_USE = r"out\.unfinished is in use by .*process.*; wait for it, or name another output_dir"


def test_a_folder_in_which_another_run_works_is_refused(prune, solved, stopped, tmp_path):
    solved.clear()
    hold(tmp_path / "out.unfinished", "", take_over=True).close()  # by the failed run
    with (tmp_path / "out.unfinished" / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(RacError, match=IN_USE):
            prune(output_dir=tmp_path / "out")
    assert not solved
    assert everything(tmp_path / "out.unfinished") == stopped


def test_two_runs_never_mix_their_groups(tmp_path):
    folder, linear = tmp_path / "out.unfinished", torch.nn.Linear(4, 4)
    first = resume.Resume(folder, {"recipe": {"sparsity": 0.5}})
    second = resume.Resume(folder, {"recipe": {"sparsity": 0.7}})
    second.begin({})
    second.add({"q": linear}, {"q": {"sparsity": 0.7}}, {})
    with pytest.raises(RacError, match=IN_USE):
        first.begin({})
    first.remove()
    with pytest.raises(RacError, match=r"another recipe has pruned \(sparsity: 0\.7 there, 0\.5"):
        resume.Resume(folder, {"recipe": {"sparsity": 0.5}})
    again = resume.Resume(folder, {"recipe": {"sparsity": 0.7}})
    again.begin({})
    assert list(again.names) == ["q"]
    again.remove()
    assert not folder.exists()


# a disk without room


def test_the_disk_is_checked_before_anything_is_sampled(prune, dense, tmp_path, monkeypatch):
    """Twice the model for the checkpoint, and once what is pruned; with codes to train masters."""
    whole = sum(p.numel() * 4 for p in dense.parameters())
    groups = sum(m.weight.numel() * 4 for m in linears(dense).values())
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free[0]))
    store = {"traces": {"store": str(tmp_path / "new.jsonl")}}
    for settings, needed in (({}, 2 * whole + groups), (RECOVERED, 2 * whole + 2 * groups)):
        free[0] = needed - 1
        with pytest.raises(RacError, match=r"0\.0 GiB are free, the checkpoint needs .* up to"):
            prune(output_dir=tmp_path / "out", **settings, **store)
        assert not (tmp_path / "new.jsonl").exists()
        free[0] = needed
        linear = linears(dense).values()
        resume.check_disk(tmp_path / "out", dense, linear, masters="recover" in settings)


def test_a_full_disk_loses_nothing(prune, pruned, solved, tmp_path, monkeypatch):
    calls = []

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        calls.append(path)
        if len(calls) == 4:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(RacError, match=r"cannot be kept .*No space left.*make room"):
        prune(output_dir=tmp_path / "out")
    assert len(list((tmp_path / "out.unfinished").iterdir())) == 3 + 2  # and about.json and .lock
    prune(output_dir=tmp_path / "out")
    assert len(solved) == 4 + GROUPS - 3
    assert result(tmp_path / "out") == result(pruned.folder)
