"""Sums whose bits do not depend on how many processes (here threads) share the terms."""

import pytest
import torch

from rac_modifier.distributed.processes import Processes
from rac_modifier.pruning import shard_sum
from rac_modifier.pruning.hessian import Hessian, Statistics
from rac_modifier.pruning.shard_sum import ShardSum
from tests.meeting import together

SHARDS, ROWS, COLUMNS = 7, 6, 6
BLOCKS = [(0, 2, 3), (2, 5, 6), (5, 6, 6)]


@pytest.fixture
def shards():
    """Batches whose order of addition decides the bits; shard 2 has one batch."""
    sizes = [1 if shard == 2 else 3 for shard in range(SHARDS)]
    return [[torch.randn(ROWS, COLUMNS) * 10.0**i for i in range(size)] for size in sizes]


def by_definition(shards):
    """Shard by shard, in the order of their numbers; each batch by batch."""
    totals = []
    for shard in shards:
        total = torch.zeros(ROWS, COLUMNS)
        for batch in shard:
            total = total + batch
        totals.append(total)
    return sum(totals[1:], totals[0])


def summed(shards, processes, blocks=None):
    sums = ShardSum(ROWS, COLUMNS, "cpu", blocks=blocks, processes=processes)
    share = shards[processes.rank :: processes.count]
    for shard in [*share, *[[]] * (-(-len(shards) // processes.count) - len(share))]:
        for batch in shard:
            cells = zip(blocks or [(0, ROWS, COLUMNS)], sums.shard, strict=True)
            for (first, last, columns), part in cells:
                part.add_(batch[first:last, :columns])
        sums.end_shard()
    sums.finish()
    return sums.total


def run(count, function):
    return together(count, function) if count > 1 else [function(Processes())]


@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["whole", "blocks"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_any_number_of_processes_gives_the_same_bits(shards, monkeypatch, count, blocks):
    monkeypatch.setattr(shard_sum, "_PIECE", 2 * COLUMNS)  # pieces of two rows and of one
    expected = by_definition(shards)
    if blocks is not None:
        expected[:2, 3:] = 0.0  # in no block
    for total in run(count, lambda processes: summed(shards, processes, blocks)):
        assert torch.equal(total, expected)


def test_a_shard_has_no_memory_outside_of_its_blocks():
    """A Hessian of four block rows: 1 + 2 + 3 + 4 of 16 blocks; a block has 64 to 1024 columns."""
    sums = ShardSum(256, 256, "cpu", blocks=Hessian.blocks(256))
    assert sum(part.numel() for part in sums.shard) == 256**2 * 10 // 16
    shares = [Hessian.numbers_of_shard(columns) / columns**2 for columns in (128, 1024, 8192)]
    assert shares == [3 / 4, 5 / 8, 9 / 16]


def test_without_an_ended_shard_the_present_one_is_the_sum():
    sums = ShardSum(1, 2, "cpu")
    sums.shard[0].add_(torch.tensor([[1.0, 2.0]]))
    assert sums.total.tolist() == [[1.0, 2.0]]
    sums.finish()
    assert sums.total.tolist() == [[1.0, 2.0]]
    sums.shard[0].add_(1.0)
    with pytest.raises(AssertionError, match="was not ended"):
        sums.finish()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_statistics_are_those_of_one_process(count):
    """Hessian, cross moment, and what they are divided by, with weights that have no exact sum."""
    inputs = [(torch.randn(3 + i % 4, 70), torch.rand(3 + i % 4) / 3) for i in range(18)]
    weights = [torch.randn(20, 70), torch.randn(30, 70)]

    def of(processes):
        statistics = Statistics(70, "cpu", weights, processes)
        rounds = -(-9 // processes.count) * processes.count
        for shard in range(processes.rank, rounds, processes.count):
            for x, w in inputs[2 * shard : 2 * shard + 2]:
                statistics.add(x, w, x * 1.1)
            statistics.end_shards(1)
        statistics.finish()
        hessian, moments = statistics.hessian, statistics.take_cross_moment()
        return hessian.take(), torch.cat(moments), hessian.weight_sum, hessian.tokens

    hessian, cross, *counts = of(Processes())
    for result in together(count, of):
        assert torch.equal(result[0], hessian)
        assert torch.equal(result[1], cross)
        assert [*result[2:]] == counts
    unsharded = Hessian(70)
    for x, w in inputs:
        unsharded.add(x, w)
    matrix = unsharded.take()
    torch.testing.assert_close(matrix, hessian)
    assert not torch.equal(matrix, hessian)
