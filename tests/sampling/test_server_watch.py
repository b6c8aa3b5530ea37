"""The watcher alone: exit codes, a closed pipe, groups that do not want to end."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from rac_modifier.sampling import server_watch
from rac_modifier.sampling.server_watch import end_group


def watch(command: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-I", "-S", server_watch.__file__, "sh", "-c", command]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    ("command", "end", "code"),
    [
        ("sleep 600 & echo started; wait", lambda watcher: watcher.stdin.close(), 143),
        ("sleep 600 & echo started; wait", lambda watcher: watcher.terminate(), 143),
        ("sleep 600 & echo started; exit 7", lambda watcher: None, 7),  # left by its shell
        ("echo started; kill -9 $$", lambda watcher: None, 137),
    ],
)
def test_all_processes_end_with_the_pipe_the_watcher_or_the_command(command, end, code):
    watcher = watch(command)
    assert watcher.stdout.readline() == b"started\n"
    end(watcher)
    assert watcher.stdout.read() == b""  # it ends when no process holds the other end
    assert watcher.wait() == code


def test_a_group_that_ignores_sigterm_is_killed_after_the_grace():
    line = "trap '' TERM; echo ready; while true; do sleep 0.1; done"
    leader = subprocess.Popen(["sh", "-c", line], stdout=subprocess.PIPE, start_new_session=True)
    leader.stdout.readline()
    end_group(leader, grace=0.0)
    assert leader.wait() == -signal.SIGKILL
