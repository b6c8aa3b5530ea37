"""Freed blocks are used again: counted in page faults of a process of its own, because the setting stays for its life."""

import os
import platform
import subprocess
import sys

import pytest

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
