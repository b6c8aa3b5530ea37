import json

import pytest
import torch

from rac_modifier.distributed.processes import Processes
from rac_modifier.distributed.torchrun import joined_processes
from tests.started import started

SCRIPT = """
import json
from pathlib import Path
import torch
from loguru import logger
from rac_modifier.distributed.torchrun import joined_processes, present_processes
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
