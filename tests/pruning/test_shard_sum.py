"""Sums whose bits do not depend on how many processes (here threads) share the terms."""

import random

import pytest
import torch

from rac_modifier.processes import Processes
from rac_modifier.pruning import shard_sum
from rac_modifier.pruning.hessian import Hessian, Statistics, blocks_of_triangle
from rac_modifier.pruning.shard_sum import ShardSum
from tests.meeting import together

SHARDS, ROWS, COLUMNS = 7, 5, 6


@pytest.fixture
def shards():
    """The batches of each shard, of sizes that make every order of addition give other bits; shard 2 has one batch."""
    return [
        [torch.randn(ROWS, COLUMNS) * 10.0**i for i in range(1 if shard == 2 else 3)]
        for shard in range(SHARDS)
    ]


def by_definition(shards):
    """Shard by shard, in the order of their numbers; each batch by batch."""
    total = None
    for shard in shards:
        one = torch.zeros(ROWS, COLUMNS)
        for batch in shard:
            one = one + batch
        total = one if total is None else total + one
    return total


def summed(shards, processes, blocks=None, slow=None):
    found = ShardSum(ROWS, COLUMNS, "cpu", blocks=blocks, processes=processes)
    own = shards[processes.rank :: processes.count]
    for shard in [*own, *[[]] * (-(-len(shards) // processes.count) - len(own))]:
        for batch in shard:
            for (first, last, columns), part in zip(
                blocks or [(0, ROWS, COLUMNS)], found.shard, strict=True
            ):
                part.add_(batch[first:last, :columns])
        if slow is not None:
            for _ in range(slow.randrange(10**5)):  # others go on meanwhile
                pass
        found.end_shard()
    found.finish()
    return found.total


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_any_number_of_processes_gives_the_same_bits(shards, monkeypatch, count):
    monkeypatch.setattr(shard_sum, "_PIECE", 2 * COLUMNS + 1)  # pieces of two rows and of one
    expected = by_definition(shards)
    ends = (
        together(count, lambda processes: summed(shards, processes))
        if count > 1
        else [summed(shards, Processes())]
    )
    assert all(torch.equal(end, expected) for end in ends)


def test_another_order_would_give_others(shards):
    """The comparison above can fail: as a share of each process, or all batches in a row."""
    expected = by_definition(shards)
    assert not torch.equal(by_definition(shards[::2]) + by_definition(shards[1::2]), expected)
    assert not torch.equal(
        by_definition([[batch for shard in shards for batch in shard]]), expected
    )


def test_who_is_slow_changes_no_bit(shards):
    expected = by_definition(shards)
    for seed in range(2):
        ends = together(
            3,
            lambda processes, seed=seed: summed(
                shards, processes, slow=random.Random(seed + processes.rank)
            ),
        )
        assert all(torch.equal(end, expected) for end in ends)


@pytest.mark.parametrize("count", [1, 3])
def test_only_the_blocks_are_summed(shards, count):
    blocks, expected = [(0, 2, 3), (2, 5, 6)], by_definition(shards)
    ends = together(count, lambda processes: summed(shards, processes, blocks))
    for end in ends:
        assert torch.equal(end[:2, :3], expected[:2, :3])
        assert torch.equal(end[2:], expected[2:])
        assert not end[:2, 3:].any()


def test_a_shard_has_no_memory_beside_its_blocks():
    """A Hessian of four block rows: 1 + 2 + 3 + 4 of 16 blocks."""
    sums = ShardSum(256, 256, "cpu", blocks=blocks_of_triangle(256))
    assert sum(part.numel() for part in sums.shard) == 256**2 * 10 // 16


def test_what_no_shard_ended_is_one():
    total = ShardSum(1, 2, "cpu")
    total.shard[0].add_(torch.tensor([[1.0, 2.0]]))
    assert total.total.tolist() == [[1.0, 2.0]]
    total.finish()
    assert total.total.tolist() == [[1.0, 2.0]]


def test_a_shard_that_was_not_ended_is_noticed():
    total = ShardSum(1, 1, "cpu")
    for _ in range(2):
        total.shard[0].add_(1.0)
        total.end_shard()
    total.shard[0].add_(1.0)
    with pytest.raises(AssertionError, match="was not ended"):
        total.finish()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_statistics_are_those_of_one_process(count):
    """Hessian, cross moment, and what they are divided by, with weights that have no exact sum."""
    inputs = [(torch.randn(3 + i % 4, 70), torch.rand(3 + i % 4) / 3) for i in range(18)]
    weights = [torch.randn(20, 70), torch.randn(30, 70)]

    def of(processes):
        found = Statistics(70, "cpu", weights, processes)
        for shard in range(
            processes.rank, -(-9 // processes.count) * processes.count, processes.count
        ):
            for x, w in inputs[2 * shard : 2 * shard + 2]:
                found.add(x, w, x * 1.1)
            found.end_shards(1)
        found.finish()
        return (
            found.hessian.matrix(),
            torch.cat(found.cross_moment()),
            found.hessian.weight_sum,
            found.hessian.tokens,
        )

    hessian, cross, weight, tokens = of(Processes())
    for end in together(count, of):
        assert torch.equal(end[0], hessian)
        assert torch.equal(end[1], cross)
        assert end[2:] == (weight, tokens)
    unsharded = Hessian(70)
    for x, w in inputs:
        unsharded.add(x, w)
    torch.testing.assert_close(unsharded.matrix(), hessian)
    assert not torch.equal(unsharded.matrix(), hessian)
    assert tokens == unsharded.tokens
