"""A folder that cannot be written and a disk without room are refused before anything is sampled; later they lose nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier import RacError
from rac_modifier.llmcompressor import resume
from rac_modifier.llmcompressor.resume import FinishedGroups
from tests.llmcompressor.unfinished_runs import (
    GROUPS,
    RECOVERED,
    everything,
    modules,
    result,
    written,
)
from tests.tiny import entry, linears


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
        lambda: prune(
            model=str(model), output_dir=place / "out", traces=entry(place / "new.jsonl")["traces"]
        )
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
    for settings, needed in (({}, 2 * whole + groups), (RECOVERED, 2 * whole + 2 * groups)):
        free[0] = needed - 1
        with pytest.raises(
            RacError,
            match=r"out: 0\.0 GiB are free, the checkpoint needs .* what is pruned so far up to",
        ):
            prune(output_dir=tmp_path / "out", **settings, **store)
        assert not (tmp_path / "new.jsonl").exists()
        free[0] = needed
        modules = linears(dense).values()
        resume.check_disk(tmp_path / "out", dense, modules, masters="recover" in settings)


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

    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(
        RacError,
        match=r"out\.unfinished: what is pruned so far cannot be kept .*No space left.*make room",
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
