"""Freed blocks are used again: counted in page faults of a process of its own, because the setting stays for its life."""

import ctypes
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest

from rac_modifier.freed_memory import (
    expect_growth,
    keep_freed_memory,
    resident,
    return_freed_memory,
)

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings"
)

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


SET_BY_USERS = [
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_ARENA_MAX",
    "GLIBC_TUNABLES",
]


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
def test_each_of_the_users_settings_counts(
    load, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
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
expect_growth(64 << 20)
return_freed_memory()
assert resident() == before, "nothing is given back below what is predicted"
more = torch.ones(16 << 20)  # 64 MiB, which fit in no gap
return_freed_memory((2 << 20) - 1)
assert resident() >= before, "nothing is given back before a small result"
grown = resident()
return_freed_memory(2 << 20)
print(grown - resident())
"""


def test_what_is_kept_is_given_back_when_asked() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * os.sysconf("SC_PAGE_SIZE") > 0.9 * 10 * (16 << 20)


class Process:
    """A process of `bytes`; giving memory back takes `took` seconds and leaves it `kept` bytes, at most."""

    def __init__(self) -> None:
        self.bytes, self.kept, self.took, self.seconds, self.calls = 1000, 1000, 0.0, 5.0, 0

    def trim(self, pad: int) -> None:
        self.bytes, self.seconds, self.calls = (
            min(self.bytes, self.kept),
            self.seconds + self.took,
            self.calls + 1,
        )

    def grows_to(self, count: int, result: int | None = None) -> int:
        """How often memory was given back until it has grown to so many bytes and was asked."""
        self.bytes = count
        return_freed_memory(result, lambda: self.seconds)
        return self.calls


@pytest.fixture
def process(load, monkeypatch: pytest.MonkeyPatch) -> Process:
    """In place of this one; nothing was predicted or given back before."""
    library, process = load(Library()), Process()
    monkeypatch.setattr(library, "malloc_trim", process.trim, raising=False)
    monkeypatch.setattr("rac_modifier.freed_memory._not_before", float("-inf"))
    monkeypatch.setattr("rac_modifier.freed_memory._limit", None)
    monkeypatch.setattr("rac_modifier.freed_memory._large", 0)
    monkeypatch.setattr("rac_modifier.freed_memory.resident", lambda: process.bytes)
    return process


def test_it_is_given_back_where_the_process_comes_near_what_is_predicted(process) -> None:
    assert process.grows_to(10**9) == 0, "nothing is predicted"
    process.bytes = 1000
    expect_growth(800)
    assert process.grows_to(1760) == 0
    assert process.grows_to(1761) == 1
    assert process.grows_to(1761) == 2


def test_what_a_process_has_after_it_is_the_limit_from_there_on(process) -> None:
    expect_growth(800)
    process.kept = 1790
    assert process.grows_to(1800) == 1
    assert process.grows_to(1790) == 1
    assert process.grows_to(1791) == 2


def test_it_is_given_back_before_large_results_alone(process) -> None:
    expect_growth(800)
    assert process.grows_to(1799, result=24) == 0
    assert process.grows_to(1799, result=25) == 1


def test_after_it_comes_a_pause_of_ten_times_as_long(process) -> None:
    expect_growth(800)
    process.took = 0.25
    assert process.grows_to(1800) == 1
    assert process.seconds == 5.25
    process.seconds = 7.74
    assert process.grows_to(1800) == 1
    process.seconds = 7.75
    assert process.grows_to(1800) == 2


def test_another_c_library_has_nothing_to_give_back(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rac_modifier.freed_memory._not_before", float("-inf"))
    monkeypatch.setattr("rac_modifier.freed_memory._limit", -1)
    load(Library(glibc=False))
    return_freed_memory()


def test_resident_memory_is_read_from_the_system() -> None:
    with mmap.mmap(-1, 64 << 20) as block:
        before = resident()
        block.write(b"x" * (64 << 20))
        assert resident() - before > 60 << 20
