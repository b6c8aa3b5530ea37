"""On the PYTHONPATH of a server: its processes count the calls of their main threads between SIGUSR1 and SIGUSR2.

SIGUSR2 writes what was counted to `<process id>.json` in the folder that RAC_COUNT_CALLS names, as [kind, file, function, calls]:
of Python functions ("py") with their file, and of those in C ("c") with the file of the caller. Python imports this module by
its name when it starts.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import sys
from types import FrameType
from typing import Any

_counts: collections.Counter[tuple[str, str, str]] = collections.Counter()


def _profile(frame: FrameType, event: str, function: Any) -> None:
    if event == "call":
        _counts["py", frame.f_code.co_filename, frame.f_code.co_qualname] += 1
    elif event == "c_call":
        _counts["c", frame.f_code.co_filename, getattr(function, "__qualname__", "")] += 1


def begin(*signalled: Any) -> None:
    """Count from here on."""
    _counts.clear()
    sys.setprofile(_profile)


def end(*signalled: Any) -> None:
    """Stop, and write what was counted."""
    sys.setprofile(None)
    path = os.path.join(os.environ["RAC_COUNT_CALLS"], f"{os.getpid()}.json")
    with open(f"{path}.part", "w") as file:
        json.dump([[*of, calls] for of, calls in _counts.items()], file)
    os.replace(f"{path}.part", path)


if "RAC_COUNT_CALLS" in os.environ:
    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)
