"""The new files of a folder: all in place or none, and one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rac_modifier.checkpoint.files import JOURNAL_FILE
from rac_modifier.checkpoint.new_files import (
    LOCK_FILE,
    STAGING,
    NewFiles,
    is_leftover,
    move_into_place,
)
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import contents


def write(new: NewFiles, text: str = "new") -> None:
    new.path("a.txt").write_text(text)
    new.write_json("b.json", {"b": 1})
    new.write_tensors("c.safetensors", {"x": torch.ones(2, 2).T}, {"format": "pt"})


def test_all_files_are_put_in_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with NewFiles(tmp_path) as new:
        write(new)
        assert (tmp_path / "a.txt").read_text() == "old"
        new.commit("job", ["a.txt", "b.json", "c.safetensors"], {})
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.json", "c.safetensors"}
    assert (tmp_path / "a.txt").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "c.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize("made", [True, False])
def test_without_commit_the_folder_is_as_before(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "out"
    if not made:
        folder.mkdir()
        (folder / "a.txt").write_text("old")
    before = contents(folder) if not made else None

    def fail() -> None:
        with NewFiles(folder, create=True) as new:
            write(new)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    if made:
        assert not folder.exists()
    else:
        assert contents(folder) == before


def test_what_a_kill_left_is_removed_by_the_next_call(tmp_path: Path) -> None:
    left = [
        ".rac_new.model.safetensors",
        "..rac_new.config.json.abc.tmp",
        f".{JOURNAL_FILE}.abc.tmp",
        LOCK_FILE,
    ]
    for name in left:
        (tmp_path / name).write_text("half")
        assert is_leftover(name)
    (tmp_path / "config.json").write_text("{}")
    assert not is_leftover("config.json")
    with NewFiles(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("renamed", [0, 1, 2, 3])
def test_the_renames_that_are_left_are_made_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    names = ["a.txt", "b.json", "c.safetensors", "config.json"]
    rename = NewFiles._rename

    def cut_off(self: NewFiles, files: list[str]) -> None:
        for name in files[:renamed]:
            self.path(name).rename(self.folder / name)
        raise KeyboardInterrupt

    monkeypatch.setattr(NewFiles, "_rename", cut_off)
    with NewFiles(tmp_path) as new:
        write(new)
        new.write_json("config.json", {})
        with pytest.raises(KeyboardInterrupt):
            new.commit("job", names, {"count": 3})
    monkeypatch.setattr(NewFiles, "_rename", rename)
    with NewFiles(tmp_path) as new:
        with pytest.raises(RacError, match=r"another job was cut off here \('job'\)"):
            new.finish("another", dict)
        assert new.finish("job", lambda summary: summary["count"]) == 3
        assert new.finish("job", dict) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == names


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_second_one_is_refused_as_long_as_the_first_one_runs(tmp_path: Path) -> None:
    with NewFiles(tmp_path) as first:
        write(first, "of the first")
        for _ in range(2):
            with (
                pytest.raises(
                    RacError, match=rf"{tmp_path}: another process is writing to it; wait"
                ),
                NewFiles(tmp_path),
            ):
                pass
        first.commit("job", ["a.txt", "b.json", "c.safetensors"], {})
    assert (tmp_path / "a.txt").read_text() == "of the first", "the refused one removed nothing"
    with NewFiles(tmp_path):
        pass


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / LOCK_FILE], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(RacError, match="another process is writing"), NewFiles(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with NewFiles(tmp_path):
        pass
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RacError, match=r"cannot be written to \(.*\); name another folder"),
        NewFiles(tmp_path / "file" / "out", create=True),
    ):
        pass


def test_the_folders_above_a_new_one_are_made_too(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with NewFiles(folder, create=True) as new:
        write(new)
    assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize(
    "names", [[], "config.json", ["config.json", ".."], ["README.md"], ["config.json", "lost.txt"]]
)
def test_a_journal_that_names_no_checkpoint_of_this_folder_is_damage(tmp_path, names) -> None:
    (tmp_path / ".rac_new.config.json").write_text("{}")
    (tmp_path / "README.md").write_text("old")
    journal = {"job": "job", "files": names, "summary": {}}
    (tmp_path / JOURNAL_FILE).write_text(json.dumps(journal))
    with NewFiles(tmp_path) as new, pytest.raises(RacError, match="is damaged"):
        new.finish("job", dict)


@pytest.mark.parametrize("moves", range(4))
def test_a_kill_while_a_saved_model_is_moved_leaves_no_config(tmp_path, monkeypatch, moves) -> None:
    """Of a folder without config.json no loader makes a model."""
    staging = tmp_path / STAGING
    staging.mkdir()
    names = ["config.json", "model.safetensors", "rac_run.json"]
    for name in names:
        (staging / name).write_text(name)
    (tmp_path / "config.json").write_text("that of an earlier model")
    replace, calls = os.replace, iter(range(10))

    def killed(source: Path, target: Path) -> None:
        if next(calls) == moves:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with contextlib.suppress(KeyboardInterrupt):
        move_into_place(staging, tmp_path)
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == names if moves == 3 else "config.json" not in there
