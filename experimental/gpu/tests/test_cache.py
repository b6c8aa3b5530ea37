"""Compiled kernels on disk: what is kept, what is compiled again, and where nothing is kept."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

import pytest
from rac_gpu import cache
from rac_gpu.cache import cached, folder, key_of

KEY = key_of("a", "b")


@pytest.fixture(autouse=True)
def nothing_was_said():
    """Each reason is logged once per process."""
    cache._warn.cache_clear()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of KEY."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "gpu"))
    return tmp_path / "gpu" / f"{KEY}.cubin"


class Build:
    """Counts how often it is called."""

    def __init__(self, content: bytes = b"code") -> None:
        self.content, self.count = content, 0

    def __call__(self) -> bytes:
        self.count += 1
        return self.content


def test_it_is_compiled_once_and_private(kept):
    build = Build()
    assert [cached(KEY, build) for _ in range(3)] == [b"code"] * 3
    assert build.count == 1
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry[:-1],
        lambda entry: entry[:20],
        lambda entry: b"",
        lambda entry: entry[:-1] + b"X",
        lambda entry: b"rac-cubin-2\n" + entry[12:],
        lambda entry: b"code",
    ],
    ids=["cut", "cut in the header", "empty", "changed", "of another version", "without a header"],
)
def test_a_damaged_entry_is_compiled_again_and_replaced(kept, damage):
    cached(KEY, Build())
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    again = Build()
    assert cached(KEY, again) == b"code"
    assert again.count == 1
    assert kept.read_bytes() == whole


def test_an_entry_under_another_name_is_compiled_again(kept):
    cached(KEY, Build())
    other = key_of("a", "c")
    (kept.parent / f"{other}.cubin").write_bytes(kept.read_bytes())
    again = Build(b"other")
    assert cached(other, again) == b"other"
    assert again.count == 1


def test_keys_differ_however_the_parts_are_cut():
    assert (
        len(
            {
                key_of("ab", "c"),
                key_of("a", "bc"),
                key_of("abc"),
                key_of("a", "b", "c"),
                key_of("", "abc"),
            }
        )
        == 5
    )


def test_a_folder_that_others_can_write_to_is_not_used(kept, caplog):
    cached(KEY, Build())
    kept.parent.chmod(0o777)
    build = Build(b"ours")
    assert cached(KEY, build) == b"ours"
    assert "belongs to another user, or others can write to it; set RAC_GPU_CACHE" in caplog.text


def test_where_nothing_can_be_written_it_is_compiled_and_said(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "gpu"))
    assert cached(KEY, Build()) == b"code"
    assert "cannot be used (Not a directory); set RAC_GPU_CACHE" in caplog.text


def test_a_full_disk_leaves_nothing_behind(kept, monkeypatch, caplog):
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cached(KEY, Build()) == b"code"
    assert "cannot be written (No space left on device)" in caplog.text
    assert list(kept.parent.iterdir()) == []


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container whose user has no HOME and is not in the table of users."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in (cache.VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()


def test_without_a_home_nothing_is_kept_and_one_line_says_so(no_home, caplog):
    assert folder() is None
    for name in "abc":  # of three layouts
        assert cached(key_of(name), Build()) == b"code"
    (record,) = caplog.records
    assert record.message == (
        "compiled GPU kernels are not kept, each process compiles them: "
        f"user {os.getuid()} has no home folder; set RAC_GPU_CACHE"
    )


@pytest.mark.parametrize("variable", [cache.VARIABLE, "XDG_CACHE_HOME"])
def test_without_a_home_a_folder_that_a_variable_names_is_used(
    no_home, monkeypatch, tmp_path, caplog, variable
):
    monkeypatch.setenv(variable, str(tmp_path / "kept"))
    again = Build(b"not called")
    cached(KEY, Build())
    assert cached(KEY, again) == b"code"
    assert again.count == 0
    assert len(list((tmp_path / "kept").rglob("*.cubin"))) == 1
    assert caplog.records == []


def test_where_it_is_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "rac_modifier" / "gpu"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder() == Path.home() / ".cache" / "rac_modifier" / "gpu"
