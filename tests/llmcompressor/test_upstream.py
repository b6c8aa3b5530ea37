"""Weights in the memory of each machine; tests/distributed/test_machines.py has a whole run."""

import threading

import torch
from compressed_tensors.offload.cache.dist_cpu import DistributedCPUCache

from rac_modifier.llmcompressor import upstream
from tests.meeting import Threads, together


def test_each_machine_has_one_copy_of_the_first_rank_s_weight(monkeypatch):
    """Ranks 0 and 1 are on a machine, rank 2 on another, where the weight is on no device."""
    mine = threading.local()
    monkeypatch.setattr(upstream, "present_processes", lambda: mine.processes)
    monkeypatch.setattr(DistributedCPUCache, "offload", DistributedCPUCache.offload)
    upstream.share_on_each_machine()
    merged = torch.arange(12, dtype=torch.bfloat16).view(2, 2, 3)
    expected = merged[1].clone()

    def offload(processes: Threads) -> torch.nn.Parameter:
        object.__setattr__(processes, "machine", 2 * (processes.rank == 2))
        mine.processes = processes
        weight = torch.empty(2, 3, device="meta" if processes.rank == 2 else "cpu")
        weight = merged[1] if processes.rank == 0 else weight
        parameter = torch.nn.Parameter(weight, requires_grad=False)
        return DistributedCPUCache("cpu").offload(parameter)

    weights = together(3, offload)
    for weight in weights:
        assert isinstance(weight, torch.nn.Parameter)
        assert torch.equal(weight, expected)
    weights[1].zero_()
    assert not weights[0].any()
    assert torch.equal(weights[2], expected)
    assert merged.any()
