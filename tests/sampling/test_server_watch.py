"""The watcher alone: exit codes, a closed pipe, groups that do not want to end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rac_modifier.sampling import server_watch
from rac_modifier.sampling.server_watch import end_group
from tests.sampling.fake_vllm import is_running, until


def watch(*command: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-I", "-S", server_watch.__file__, *command]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def pids_of(watcher: subprocess.Popen[bytes]) -> tuple[int, int]:
    """A shell that was told to, and the process that it started."""
    assert watcher.stdout is not None
    shell, inner = watcher.stdout.readline().split()
    return int(shell), int(inner)


SHELL = ("sh", "-c", "sleep 600 & echo $$ $!; wait")


@pytest.mark.parametrize(
    ("command", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)]
)
def test_the_exit_code_is_that_of_the_command(command, code):
    assert watch("sh", "-c", command).wait(300) == code


def test_all_processes_end_when_the_pipe_closes():
    watcher = watch(*SHELL)
    pids = pids_of(watcher)
    assert all(map(is_running, pids))
    watcher.stdin.close()
    assert watcher.wait(300) == 143
    assert until(lambda: not any(map(is_running, pids)))


def test_it_does_not_wait_for_processes_that_have_ended():
    """A process whose parent is gone stays in the group until somebody collects it."""
    folder = str(Path(server_watch.__file__).parent)
    code = (
        f"import sys; sys.path.insert(0, {folder!r}); import server_watch; "
        "server_watch.end_group.__defaults__ = (1e9,); sys.exit(server_watch.main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, *SHELL]
    watcher = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pids_of(watcher)
    watcher.stdin.close()
    assert watcher.wait(300) == 143, "it does not wait for the end of the grace"


def test_all_processes_end_with_the_watcher_on_sigterm():
    watcher = watch(*SHELL)
    pids = pids_of(watcher)
    watcher.terminate()
    assert watcher.wait(300) == 143
    assert until(lambda: not any(map(is_running, pids)))


def test_what_a_command_leaves_behind_ends_too():
    watcher = watch("sh", "-c", "sleep 600 & echo $$ $!")
    _, inner = pids_of(watcher)
    assert watcher.wait(300) == 0
    assert until(lambda: not is_running(inner))


def test_a_group_that_ignores_sigterm_is_killed_after_the_grace():
    line = "trap '' TERM; echo ready; while true; do sleep 0.1; done"
    leader = subprocess.Popen(["sh", "-c", line], stdout=subprocess.PIPE, start_new_session=True)
    leader.stdout.readline()
    end_group(leader, grace=0.5)
    assert leader.returncode == -signal.SIGKILL
