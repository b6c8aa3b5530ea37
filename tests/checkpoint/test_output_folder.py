"""The folder of a model that is named, and folders that cannot be written to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rac_modifier.checkpoint.files import JOURNAL_FILE
from rac_modifier.checkpoint.output_folder import (
    bytes_of_weights,
    cached_folder,
    check_output_folder,
    check_room,
    local_folder,
    unfinished,
)
from rac_modifier.errors import RacError


@pytest.mark.parametrize("name", ["config.json", JOURNAL_FILE])
def test_a_folder_is_itself(tmp_path: Path, name: str) -> None:
    """Also where packing was cut off: what reads it has a better message."""
    (tmp_path / name).write_text("{}")
    assert local_folder(tmp_path) == tmp_path


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of owner/model in an empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--owner--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--model" / "refs").mkdir()
    (tmp_path / "models--owner--model" / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_a_hub_id_is_its_snapshot_in_the_cache(cached: Path, tmp_path: Path) -> None:
    assert cached_folder("owner/model") is None
    (cached / "config.json").write_text("{}")
    assert local_folder("owner/model") == cached_folder("owner/model") == cached
    assert cached_folder(str(tmp_path)) == tmp_path
    with pytest.raises(
        RacError,
        match=r"owner/name: neither a folder nor a model that can be had from the hub \(.+\); check",
    ):
        local_folder("owner/name")


@pytest.mark.parametrize("name", ["gone", "a/b/c", "/gone/model", "./gone", "~/gone"])
def test_a_folder_that_is_not_there_needs_no_network(name: str) -> None:
    with pytest.raises(
        RacError, match=rf"^{name}: no such folder; give the folder of a saved model, or a hub id"
    ):
        local_folder(name)


def test_what_can_be_written_to(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    check_output_folder(tmp_path / "new" / "deep", source, 0)
    check_output_folder(out, source, 0)
    (out / ".rac_saving").mkdir()
    for left in (".rac_new.model.safetensors", ".rac_packing.lock"):
        (out / left).touch()  # by a job that was cut off
    check_output_folder(out, source, 0)
    (out / ".rac_packing.json").touch()  # the same job would finish its renames
    with pytest.raises(RacError, match="is in use"):
        check_output_folder(out, source, 0)


def test_what_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    for same in (source, tmp_path / "link", tmp_path / "model" / "." / ".." / "model"):
        with pytest.raises(
            RacError, match="is the model itself, which is left as it is; name another folder"
        ):
            check_output_folder(same, source, 0)
    (source / "config.json").touch()
    with pytest.raises(RacError, match="is a file; name a folder"):
        check_output_folder(source / "config.json", source, 0)
    with pytest.raises(RacError, match="is in use; name an empty or a new one"):
        check_output_folder(source, None, 0)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 3 * 2**30)
    )
    check_output_folder(tmp_path / "new", source, 3 * 2**30)
    with pytest.raises(RacError, match=r"3\.0 GiB are free, the checkpoint needs up to 3\.5 GiB"):
        check_output_folder(tmp_path / "new", source, 7 * 2**29)


def test_groups_that_are_kept_beside_the_output_need_room_until_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 5 * 2**30)
    )
    check_room(out, 3 * 2**30, 2 * 2**30)
    with pytest.raises(
        RacError,
        match=r"5\.0 GiB are free, the checkpoint needs up to 3\.0 GiB .* what is pruned so far up to 2\.5 GiB next to it; free",
    ):
        check_room(out, 3 * 2**30, 5 * 2**29)
    unfinished(out).mkdir()
    with (unfinished(out) / "group-00000.safetensors").open("wb") as file:
        file.truncate(2**29)  # of a run that goes on: written already
    check_room(out, 3 * 2**30, 5 * 2**29)
    with pytest.raises(RacError, match="next to it"):
        check_room(out, 3 * 2**30, 5 * 2**29 + 1)


def test_the_bytes_of_weights_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(70))
    assert bytes_of_weights(str(tmp_path)) == 70
    (tmp_path / "model-1.safetensors").write_bytes(bytes(40))
    (tmp_path / "model-2.safetensors").write_bytes(bytes(2))
    assert bytes_of_weights(str(tmp_path)) == 42  # the same weights in another format are not read


def test_the_bytes_of_weights_of_a_hub_id_are_those_in_the_cache(cached: Path) -> None:
    assert bytes_of_weights("owner/model") is None  # not there yet
    assert bytes_of_weights("owner/other") is None
    assert bytes_of_weights("no hub id//") is None
    (cached / "model.safetensors").write_bytes(bytes(30))
    assert bytes_of_weights("owner/model") == 30
    (cached / "model.safetensors.index.json").write_text(
        '{"metadata": {"total_size": 99}, "weight_map": {}}'
    )
    assert bytes_of_weights("owner/model") == 99
    (cached / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    assert bytes_of_weights("owner/model") is None
