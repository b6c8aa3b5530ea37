import sys

import pytest

from tests.started import started

FAILS = """
import sys
from rac_modifier.errors import RacError
from rac_modifier.distributed.processes import ProcessFailedError
from rac_modifier.distributed.torchrun import joined_processes
try:
    with joined_processes() as processes:
        if processes.rank == 1:
            raise RacError("no room")
        processes.wait()
except ProcessFailedError as error:
    print(error, file=sys.stderr, flush=True)
    sys.exit(3)
"""


def test_an_error_in_one_reaches_the_others(tmp_path):
    (code, said), (other, error) = started(["-c", FAILS], tmp_path)
    assert (code, other) == (3, 1)
    assert "process 1 of 2 has failed: no room" in said
    assert "RacError: no room" in error


KILLED = """
import os, signal, sys
from pathlib import Path
from rac_modifier.distributed.processes import ProcessFailedError
from rac_modifier.distributed.torchrun import joined_processes
try:
    with joined_processes() as processes:
        if processes.is_first:  # with all that is open, as torch's program for shared memory
            os.posix_spawn("/bin/sh", ["sh", "-c", "exec 2>&1; sleep 30; touch over"], os.environ)
            os.kill(os.getpid(), signal.SIGKILL)
        processes.wait()
except ProcessFailedError as error:
    print(Path("over").exists(), error, file=sys.stderr, flush=True)
    os._exit(3)
"""


def test_a_killed_process_is_noticed_while_a_program_that_it_started_goes_on(tmp_path):
    (code, _), (other, said) = started(["-c", KILLED], tmp_path)
    assert (code, other) == (-9, 3)
    assert "False another of the 2 processes has ended" in said


def test_other_commands_are_refused_under_torchrun(monkeypatch, capsys):
    from rac_modifier import cli

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["rac", "inspect", "x", "y"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "rac inspect runs in one process" in " ".join(capsys.readouterr().err.split())
