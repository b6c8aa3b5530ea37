"""The folder of a model that is named, and folders that cannot be written to."""

import contextlib
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch

from rac_modifier.checkpoint.files import write_tensors_atomic
from rac_modifier.checkpoint.output_folder import (
    STAGING,
    bytes_of_weights,
    check_output_folder,
    check_room,
    local_folder,
    move_into_place,
    new_files,
    unfinished,
)
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import contents


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """The folder of owner/model in an empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--owner--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--model" / "refs").mkdir()
    (tmp_path / "models--owner--model" / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_a_hub_id_is_its_snapshot_in_the_cache(cached):
    (cached / "config.json").write_text("{}")
    assert local_folder("owner/model") == cached
    with pytest.raises(
        RacError,
        match=r"owner/name: neither a folder nor a model that can be had from the hub \(.+\); "
        r"check",
    ):
        local_folder("owner/name")


@pytest.mark.parametrize("name", ["gone", "a/b/c", "/gone/model", "./gone", "~/gone"])
def test_a_folder_that_is_not_there_needs_no_network(name):
    with pytest.raises(
        RacError, match=rf"^{name}: no such folder; give a saved model's, or a hub id"
    ):
        local_folder(name)


def test_what_can_be_written_to(tmp_path, monkeypatch):
    source, out = tmp_path / "model", tmp_path / "out"
    for folder in (source, out, out / ".rac_saving"):  # left by a job that was killed
        folder.mkdir()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").touch()
    check_output_folder(tmp_path / "new" / "deep", source)
    check_output_folder(out, source)
    (out / "model.safetensors").touch()
    for folder, message in (
        (out, "is in use"),
        (tmp_path / "link", "is the model itself, which is left as it is; name another"),
        (tmp_path / "file", "is a file; name another folder"),
        (tmp_path / "file" / "out", "out: .*file is a file; name another folder"),
    ):
        with pytest.raises(RacError, match=message):
            check_output_folder(folder, source)
    free = shutil._ntuple_diskusage(0, 0, 3 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    check_room(tmp_path / "new", 3 * 2**30)
    with pytest.raises(RacError, match=r"3\.0 GiB are free, the checkpoint needs up to 3\.5 GiB"):
        check_room(tmp_path / "new", 7 * 2**29)


def test_folders_without_a_name_of_their_own(tmp_path, monkeypatch):
    here = tmp_path / "out"
    here.mkdir()
    monkeypatch.chdir(here)
    for folder in (".", "", "../out", "deep/.."):
        check_output_folder(Path(folder))
        check_room(Path(folder), 1, 1)
        assert unfinished(folder) == tmp_path / "out.unfinished"
    check_room(Path("/"), 1)
    assert unfinished("new") == here / "new.unfinished"


def test_groups_that_are_kept_need_space_until_they_are_there(tmp_path, monkeypatch):
    out, free = tmp_path / "out", shutil._ntuple_diskusage(0, 0, 5 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    check_room(out, 3 * 2**30, 2 * 2**30)
    with pytest.raises(RacError, match=r"what is pruned so far up to 2\.5 GiB next to it; free"):
        check_room(out, 3 * 2**30, 5 * 2**29)
    unfinished(out).mkdir()
    with (unfinished(out) / "group-00000.safetensors").open("wb") as file:
        file.truncate(2**29)  # of a run that goes on: written already
    check_room(out, 3 * 2**30, 5 * 2**29)


def test_the_bytes_of_weights_are_those_of_the_folder_or_in_the_cache(cached, tmp_path):
    assert bytes_of_weights("owner/model") is None  # not there yet
    assert bytes_of_weights("no hub id//") is None
    for folder, name in ((cached, "owner/model"), (tmp_path, str(tmp_path))):
        (folder / "config.json").write_text("{}")
        (folder / "pytorch_model.bin").write_bytes(bytes(70))
        assert bytes_of_weights(name) == 70
        for number in (1, 2):
            (folder / f"model-{number}.safetensors").write_bytes(bytes(20))
        (folder / "consolidated.safetensors").write_bytes(bytes(40))  # as Mistral's models have it
        assert bytes_of_weights(name) == 40  # the same weights in another format are not read


def write(new: Path, text: str = "new") -> None:
    (new / "a.txt").write_text(text)
    (new / "b.json").write_text("{}")
    write_tensors_atomic(new / "c.safetensors", {"x": torch.ones(2, 2).T}, {})


def test_all_files_are_put_in_place(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / STAGING / "left").mkdir(parents=True)  # by a kill
    with new_files(tmp_path) as new:
        write(new)
        assert (tmp_path / "a.txt").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.json", "c.safetensors"}
    assert (tmp_path / "a.txt").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "c.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize("is_new", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_after_an_error_the_folder_is_as_before(tmp_path, is_new, error):
    folder = tmp_path / "out"
    if not is_new:
        folder.mkdir()
        (folder / "a.txt").write_text("old")
    message = r"out: cannot be written \(.*No space left.*it is as before; make room"
    expected, match = (RacError, message) if isinstance(error, OSError) else (type(error), None)

    def fail() -> None:
        with new_files(folder) as new:
            write(new)
            raise error

    with pytest.raises(expected, match=match):
        fail()
    if is_new:
        assert not folder.exists()
    else:
        assert contents(folder) == {"a.txt": b"old"}


def test_a_second_one_is_refused_as_long_as_the_first_one_runs(tmp_path):
    message = rf"{tmp_path}: another process writes to it; wait"
    with new_files(tmp_path) as first:
        write(first, "of the first")
        for _ in range(2):
            with pytest.raises(RacError, match=message), new_files(tmp_path):
                pass
    assert (tmp_path / "a.txt").read_text() == "of the first", "the refused one removed nothing"
    with new_files(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    message = r"cannot be written to \(.*\); name another folder"
    with pytest.raises(RacError, match=message), new_files(tmp_path / "file" / "out"):
        pass


@pytest.mark.parametrize("moves", range(4))
def test_a_kill_while_a_saved_model_is_moved_leaves_no_config(tmp_path, monkeypatch, moves):
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
