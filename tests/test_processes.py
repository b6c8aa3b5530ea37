import json
import sys

import pytest
import torch

from rac_modifier.processes import Processes
from rac_modifier.torchrun import joined_processes, refuse_processes, started_processes
from tests.started import started

SCRIPT = """
import json
from pathlib import Path
import torch
from loguru import logger
from rac_modifier.torchrun import joined_processes, present_processes
with joined_processes() as processes:
    rank = processes.rank
    if processes.is_first:
        Path("of the first").mkdir()
        Path("of the first/config.json").write_text("{}")
        Path("of the first/weights").write_bytes(bytes(range(256)) * 4)
    processes.copy(Path("of the first"), Path(f"copy of {rank}"), needed=not processes.is_first)
    sums = processes.sums(0.1 + processes.rank, 2.0)
    joined = processes.joined(torch.full((2,), processes.rank))
    exchanged = processes.exchanged(torch.arange(6) + 10 * processes.rank)
    of_second = torch.full((2,), 1, dtype=torch.float8_e4m3fn) if processes.rank else None
    sent = processes.send(of_second, 1).float()
    told = [processes.from_first({"rank": rank}), processes.from_all(["x" * (1 + 5 * rank)])]
    same = present_processes() is processes
    exchanged = [shard.tolist() for shard in exchanged]
    results = [sums, joined.tolist(), sent.tolist(), told, same, exchanged]
    results = [rank, processes.count, str(processes.device), *results]
    Path(f"{rank}.json").write_text(json.dumps(results))
"""


def test_without_torchrun_there_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert started_processes() == 1
    refuse_processes("it")
    with joined_processes() as processes:
        assert processes == Processes(0, 1, None)
        assert processes.is_first
        processes.wait()
        tensor = torch.ones(2)
        assert processes.joined(tensor) is processes.send(tensor, 0) is tensor
        assert processes.exchanged(tensor)[0] is tensor
        assert (processes.from_first(3), processes.from_all(3)) == (3, [3])
        assert processes.sums(0.25, 3.0) == [0.25, 3.0]
        assert not torch.distributed.is_initialized()


def test_two_processes_exchange_and_copy_what_the_first_has_written(tmp_path):
    ends = started(["-c", SCRIPT], tmp_path)
    assert [code for code, _ in ends] == [0, 0], ends
    actual = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [end[:3] for end in actual] == [[0, 2, "cpu"], [1, 2, "cpu"]]
    assert actual[0][3:-1] == actual[1][3:-1]
    assert actual[0][3] == [pytest.approx(1.2), 4.0]
    assert actual[0][4] == [0, 0, 1, 1]
    assert actual[0][5:-1] == [[1.0, 1.0], [{"rank": 0}, [["x"], ["xxxxxx"]]], True]
    (copied,) = tmp_path.glob("copy of *")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {
        "config.json": b"{}",
        "weights": bytes(range(256)) * 4,
    }
    assert [end[-1] for end in actual] == [[[0, 1, 2], [10, 11, 12]], [[3, 4, 5], [13, 14, 15]]]


FAILS = """
import sys
from rac_modifier.errors import RacError
from rac_modifier.processes import ProcessFailedError
from rac_modifier.torchrun import joined_processes
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
from rac_modifier.processes import ProcessFailedError
from rac_modifier.torchrun import joined_processes
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
