"""Which part of the parameters and of a batch a process has. Whole runs in two processes: test_sharded_processes.py."""

from __future__ import annotations

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.processes import Processes
from rac_modifier.recovery.fixed_mask import FixedMask
from rac_modifier.recovery.sharded import Sharded, Whole, spread
from tests.recovery.recovery_helpers import dense_and_sparse, sequences

NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(("rows", "parts"), [(6, [2, 2, 2]), (5, [2, 2, 1]), (2, [1, 1, 0])])
def test_rows_are_spread_in_order(rows, parts):
    whole, found = torch.arange(rows * 2).view(rows, 2), []
    for rank in range(3):
        process = Sharded.__new__(Sharded)
        process.processes = Processes(rank, 3)
        found.append(process.part("w", whole))
    assert [len(part) for part in found] == parts
    assert torch.equal(torch.cat(found), whole)


def test_one_process_keeps_the_parameters_as_they_are():
    _, model = dense_and_sparse()
    shards = spread(model, dict(model.named_parameters()), None, Processes())
    assert type(shards) is Whole
    assert shards.model is model
    assert shards.own([[1, 2], [3]]) == [([1, 2], 1.0), ([3], 1.0)]
    parameter = model.get_parameter(f"{NAME}.weight")
    assert shards.local(parameter).data_ptr() == parameter.data_ptr()


@pytest.mark.parametrize("count", [2, 3, 7])
def test_sequences_of_a_batch_are_shared_and_all_run_as_many_batches(count):
    batches = [sequences(5, seed=1), sequences(2, seed=2)]
    shares = []
    for rank in range(count):
        process = Sharded.__new__(Sharded)
        process.processes = Processes(rank, count)
        shares.append(process.own(batches))
    for number, batch in enumerate(batches):
        counted = [s for share in shares for s in share[number][0] if share[number][1] == 1.0]
        assert sorted(counted) == sorted(batch)
        assert all(len(share[number][0]) for share in shares)
        assert {share[number][1] for share in shares} <= {0.0, 1.0}


def test_a_model_whose_layers_are_unknown_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model[0].weight.data[:, ::2] = 0.0
    with pytest.raises(RacError, match=r"Sequential has no layers .* leave torchrun out"):
        spread(
            model,
            dict(model.named_parameters()),
            FixedMask(model),
            Processes(0, 2, torch.device("cpu")),
        )
