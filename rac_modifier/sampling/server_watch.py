"""Run a command, and end it with all processes that it started when standard input closes.

`own_server.py` starts this file as a script, so it imports nothing of this package. The process that wants the command holds the
other end of its standard input: however that process ends, by SIGKILL too, the system closes it.
"""

from __future__ import annotations

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
    told = False

    def tell(*_: object) -> None:
        nonlocal told
        told = True

    signal.signal(signal.SIGTERM, tell)
    _adopt_orphans()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while child.poll() is None and not told:
        readable, _, _ = select.select([0], [], [], _LOOK_EVERY)
        if readable and not os.read(0, 1):
            break
    end_group(child)
    code = child.wait()
    return 128 - code if code < 0 else code


def end_group(leader: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """End all processes of the group that `leader` leads: SIGTERM, and SIGKILL after `grace` seconds."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(leader.pid, signal_)
            deadline = time.monotonic() + grace
            while time.monotonic() < deadline:
                _reap(leader)
                os.killpg(leader.pid, 0)
                time.sleep(0.02)
        except ProcessLookupError:
            return


def _reap(leader: subprocess.Popen[bytes]) -> None:
    """Collect the processes of the group that have ended: until then they count as members of it."""
    if leader.poll() is None:
        return
    try:
        while os.waitpid(-leader.pid, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def _adopt_orphans() -> None:
    """Become the parent of what the command leaves behind, since process 1 of a container may collect nothing. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
