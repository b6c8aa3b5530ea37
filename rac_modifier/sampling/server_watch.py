"""Run a command, and end it with all processes that it started when standard input closes.

`own_server.py` starts this file as a script, so it imports nothing of this package. The
process that wants the command holds the other end of standard input: however it ends, the
system closes that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_EVERY = 0.1  # seconds
GRACE = 20.0  # seconds between SIGTERM and SIGKILL


def main(command: list[str]) -> int:
    """Run `command` in a session of its own until it ends, standard input closes or SIGTERM comes.

    Returns its exit code; 128 + n after signal n.
    """
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
    if sys.platform == "linux":  # orphans of the command become children of this process
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while child.poll() is None and not terminated:
        readable, _, _ = select.select([0], [], [], _LOOK_EVERY)
        if readable and not os.read(0, 1):
            break
    end_group(child)
    code = child.wait()
    return 128 - code if code < 0 else code


def end_group(leader: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """End all processes of the group of `leader`: SIGTERM, and SIGKILL after `grace` seconds."""
    with contextlib.suppress(ProcessLookupError):
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(leader.pid, number)
            deadline = time.monotonic() + grace
            while time.monotonic() < deadline:
                _reap(leader)
                os.killpg(leader.pid, 0)
                time.sleep(0.02)


def _reap(leader: subprocess.Popen[bytes]) -> None:
    """Collect ended processes of the group: until then they count as members of it."""
    if leader.poll() is not None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-leader.pid, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
