"""The folder of a model that is named, and folders that cannot be written to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rac_modifier.checkpoint.files import JOURNAL_FILE
from rac_modifier.checkpoint.output_folder import check_output_folder, local_folder
from rac_modifier.errors import RacError


def test_a_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert local_folder(tmp_path) == tmp_path


def test_a_folder_whose_packing_was_cut_off_is_one(tmp_path: Path) -> None:
    """What reads it has a better message."""
    (tmp_path / JOURNAL_FILE).write_text("{}")
    assert local_folder(tmp_path) == tmp_path


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_id_is_its_snapshot_in_the_cache(hub_cache: Path) -> None:
    folder = hub_cache / "models--owner--name"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    assert local_folder("owner/name") == snapshot


def test_a_hub_id_that_cannot_be_had(hub_cache: Path) -> None:
    with pytest.raises(
        RacError, match=r"owner/name: neither a folder nor a model that can be had from the hub \(.+\); check"
    ):
        local_folder("owner/name")


@pytest.mark.parametrize("name", ["gone", "a/b/c", "/gone/model", "./gone", "~/gone"])
def test_a_folder_that_is_not_there_needs_no_network(name: str) -> None:
    with pytest.raises(RacError, match=rf"^{name}: no such folder; give the folder of a saved model, or a hub id"):
        local_folder(name)


def test_what_can_be_written_to(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    check_output_folder(tmp_path / "new" / "deep", source, 0)
    check_output_folder(out, source, 0)
    for left in (".rac_new.model.safetensors", ".rac_packing.json", ".rac_packing.lock"):
        (out / left).touch()  # by a job that was cut off
    check_output_folder(out, source, 0)


def test_what_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (tmp_path / "link").symlink_to(source)
    for same in (source, tmp_path / "link", tmp_path / "model" / "." / ".." / "model"):
        with pytest.raises(RacError, match="is the model itself, which is left as it is; name another folder"):
            check_output_folder(same, source, 0)
    (source / "config.json").touch()
    with pytest.raises(RacError, match="is a file; name a folder"):
        check_output_folder(source / "config.json", source, 0)
    with pytest.raises(RacError, match="is in use; name an empty or a new one"):
        check_output_folder(source, None, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 3 * 2**30))
    check_output_folder(tmp_path / "new", source, 3 * 2**30)
    with pytest.raises(RacError, match=r"3\.0 GiB are free, the checkpoint needs up to 3\.5 GiB"):
        check_output_folder(tmp_path / "new", source, 7 * 2**29)
