"""Memory that glibc keeps for the next tensor when one is freed.

By default glibc gives a block of more than some MiB back to the system when it is freed, and the next tensor of that size takes
new pages one by one. A run on a CPU makes tensors of some 100 MiB all the time, and spends a large part of its time on that.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path

# Blocks of many sizes leave gaps in glibc's heap, so that a process takes so many times the pages that its blocks need (how well
# predictions fit with that: docs/results/scale.md).
WITH_GAPS = 1.15
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of mallopt, from malloc.h
_BLOCKS = 256 << 20  # blocks up to this size are kept
_KEPT = 1 << 30  # as much, free at the end of the heap, is not given back
_ROOM = 0.05  # of what is predicted, which an operator may take before the next one asks again
_LARGE = 1 / 32  # of what is predicted: operators with a result of this size ask
# So many times as long as giving back took, before it is done again: taking the pages anew costs five times as much.
_PAUSE = 10.0
_not_before = float("-inf")  # seconds of the processor
_limit: int | None = None  # bytes of the process
_large = 0  # bytes of a result
_SET_BY_USER = (
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_ARENA_MAX",
    "GLIBC_TUNABLES",
)


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to 256 MiB, and up to 1 GiB at the end of the heap, for the rest of this process.

    Threads then share one heap, because those of their own are too small for such blocks. What environment variables set stays
    as it is.

    Returns:
        whether anything was set: not with another C library than glibc, nor where the user has set these.
    """
    if any(name in os.environ for name in _SET_BY_USER):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    options = ((_MMAP_THRESHOLD, _BLOCKS), (_TRIM_THRESHOLD, _KEPT), (_ARENA_MAX, 1))
    return all(library.mallopt(option, value) == 1 for option, value in options)


def expect_growth(predicted: int) -> None:
    """From here on this process is predicted to grow by so many bytes: `return_freed_memory` is to keep it below that."""
    global _limit, _large
    _limit, _large = resident() + int(predicted * (1 - _ROOM)), int(predicted * _LARGE)


def return_freed_memory(
    result: int | None = None, now: Callable[[], float] = time.process_time
) -> None:
    """Give back what glibc keeps, where this process has grown to 95 % of what is predicted.

    What comes next needs blocks of other sizes: what was left free would be held beside them. Giving it back has a price, since
    each page that is taken anew is cleared first. So it is done only there, and after a pause of ten times as long as it took the
    last time. What the process has after it becomes the new limit, if it is more.

    Args:
        result: bytes of the result of the operator that comes next; below a 32nd of what is predicted nothing is done.
        now: seconds of the processor.
    """
    global _not_before, _limit
    if _limit is None or (result is not None and result < _large):
        return
    if resident() <= _limit or now() < _not_before:
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # of glibc alone
        began = now()
        library.malloc_trim(0)
        ended = now()
        _not_before = ended + _PAUSE * (ended - began)
        _limit = max(_limit, resident())


def resident() -> int:
    """Bytes of memory that this process has now; 0 where the system does not say it as Linux does."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
