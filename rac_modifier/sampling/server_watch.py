"""Run a command, and end it with all processes that it started when standard input closes.

`own_server.py` starts this file as a script. The process that wants the command holds the other end
of standard input: however it ends, the system closes that.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys

_LOOK_EVERY = 0.1  # seconds
GRACE = 20.0  # seconds between SIGTERM and SIGKILL


def _main(command: list[str]) -> int:
    """Run `command` in a session of its own; return its exit code, 128 + n after signal n."""
    terminated: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: terminated.append(number))
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
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(leader.pid, number)
            leader.wait(grace)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
