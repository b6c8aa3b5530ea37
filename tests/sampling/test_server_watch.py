"""Groups that do not want to end; test_own_server.py has the watcher."""

from __future__ import annotations

import signal
import subprocess

from rac_modifier.sampling.server_watch import end_group


def test_a_group_that_ignores_sigterm_is_killed_after_the_grace():
    line = "trap '' TERM; echo ready; while true; do sleep 0.1; done"
    leader = subprocess.Popen(["sh", "-c", line], stdout=subprocess.PIPE, start_new_session=True)
    leader.stdout.readline()
    end_group(leader, grace=0.0)
    assert leader.wait() == -signal.SIGKILL
