"""Freed blocks are used again: counted in page faults of a process of its own, because the setting stays for its life."""

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest

from rac_modifier.freed_memory import expect_growth, keep_freed_memory, resident, return_freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings")

# 20 times 64 MiB, written and freed: so many bytes of pages each time where they are new.
BYTES = 20 * (64 << 20)
CODE = """
import ctypes, resource, sys, threading
import torch
from rac_modifier.freed_memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE: huge pages would hide most faults
def work():
    for _ in range(20):
        torch.ones(16 << 20)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if sys.argv[2] == "thread":
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, where: str, **environment: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, how, where],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    said, count = done.stdout.split()[-2:]
    return said, int(count)


@pytest.mark.parametrize("where", ["main", "thread"])
def test_freed_blocks_are_used_again(where: str) -> None:
    _, new = faults("leave", where)
    said, kept = faults("keep", where)
    assert said == "True"
    assert new > BYTES / os.sysconf("SC_PAGE_SIZE") / 4, (
        "the reason for this setting is gone: glibc keeps such blocks by itself"
    )
    assert kept < new / 10


def test_what_the_user_has_set_stays() -> None:
    assert faults("keep", "main", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


class Library:
    """A C library that notes what it is told."""

    def __init__(self, answers: dict[int, int] | None = None, glibc: bool = True):
        self.told: list[tuple[int, int]] = []
        self.answers = answers or {}
        if glibc:
            self.gnu_get_libc_version = None

    def mallopt(self, option: int, value: int) -> int:
        self.told.append((option, value))
        return self.answers.get(option, 1)


SET_BY_USERS = ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Library], Library]:
    """Puts a library in place of the C library of this process, which itself is left as it is."""
    for name in SET_BY_USERS:
        monkeypatch.delenv(name, raising=False)

    def load(library: Library) -> Library:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
        return library

    return load


def test_it_sets_the_thresholds_and_one_heap(load) -> None:
    """M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX of glibc's malloc.h."""
    library = load(Library())
    assert keep_freed_memory() is True
    assert dict(library.told) == {-3: 256 * 1024 * 1024, -1: 1024 * 1024 * 1024, -8: 1}


@pytest.mark.parametrize("name", SET_BY_USERS)
def test_each_of_the_users_settings_counts(load, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    library = load(Library())
    monkeypatch.setenv(name, "")
    assert keep_freed_memory() is False
    assert library.told == []


@pytest.mark.parametrize("refused", [-3, -1, -8])
def test_what_glibc_refuses_is_not_called_set(load, refused: int) -> None:
    load(Library({refused: 0}))
    assert keep_freed_memory() is False


def test_another_c_library_is_left_alone(load) -> None:
    library = load(Library(glibc=False))
    assert keep_freed_memory() is False
    assert library.told == []


RETURNED = """
import torch
from rac_modifier.freed_memory import expect_growth, keep_freed_memory, return_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

assert keep_freed_memory()
blocks = [torch.ones(4 << 20) for _ in range(20)]  # 16 MiB each
small = blocks[1::2]  # every other one stays: what is free lies between them
del blocks
before = resident()
expect_growth(2 << 20)
return_freed_memory()
assert resident() == before, "nothing is given back below what is predicted"
return_freed_memory(2 << 20)
print(before - resident())
"""


def test_what_is_kept_is_given_back_when_asked() -> None:
    done = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    assert int(done.stdout) * os.sysconf("SC_PAGE_SIZE") > 0.9 * 10 * (16 << 20)


@pytest.fixture
def trims(load, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The calls of malloc_trim, which leave the process at 1,000 bytes; nothing was predicted or given back before."""
    library, calls = load(Library()), list[int]()
    monkeypatch.setattr(library, "malloc_trim", calls.append, raising=False)
    monkeypatch.setattr("rac_modifier.freed_memory._returned", float("-inf"))
    monkeypatch.setattr("rac_modifier.freed_memory._limit", None)
    monkeypatch.setattr("rac_modifier.freed_memory.resident", lambda: 1000)
    return calls


def test_it_is_given_back_once_a_second(trims) -> None:
    expect_growth(-4)
    for second in (5.0, 5.5, 5.9, 6.0, 6.1):
        return_freed_memory(2 * int(10 * second), lambda second=second: second)
    assert trims == [0, 0]


def test_it_is_given_back_only_where_the_prediction_would_be_exceeded(trims) -> None:
    seconds = iter(range(100))
    return_freed_memory(10**9, lambda: next(seconds))
    assert trims == [], "nothing is predicted"
    expect_growth(800)
    return_freed_memory(600, lambda: next(seconds))
    assert trims == []
    return_freed_memory(601, lambda: next(seconds))
    assert trims == [0]
    return_freed_memory(601, lambda: next(seconds))
    assert trims == [0], "what it could not be kept below is the limit from there on"
    return_freed_memory(602, lambda: next(seconds))
    assert trims == [0, 0]


def test_another_c_library_has_nothing_to_give_back(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rac_modifier.freed_memory._returned", float("-inf"))
    monkeypatch.setattr("rac_modifier.freed_memory._limit", -1)
    load(Library(glibc=False))
    return_freed_memory()


def test_resident_memory_is_read_from_the_system() -> None:
    with mmap.mmap(-1, 64 << 20) as block:
        before = resident()
        block.write(b"x" * (64 << 20))
        assert resident() - before > 60 << 20
