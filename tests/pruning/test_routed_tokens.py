"""Which tokens an expert is calibrated on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.processes import Processes
from rac_modifier.pruning.routed_tokens import ExpertTokens, all_rows, filled_up, routed_rows
from tests.meeting import together

ALONE = Processes()


@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 2**31))
def test_each_expert_has_the_counted_tokens_that_chose_it(tokens, experts, seed):
    generator = torch.Generator().manual_seed(seed)
    k = min(2, experts)
    chosen = torch.rand(tokens, experts, generator=generator).topk(k).indices
    counted = torch.rand(tokens, generator=generator) > 0.3
    found = routed_rows(chosen, counted, experts)
    assert len(found) == experts
    for expert, rows in enumerate(found):
        assert rows.tolist() == [
            t for t in range(tokens) if counted[t] and expert in chosen[t].tolist()
        ]


def test_a_number_beyond_the_experts_is_no_expert():
    """Some routers give it to tokens that they drop."""
    found = routed_rows(torch.tensor([[0, 4], [3, 5], [1, 4]]), torch.ones(3, dtype=torch.bool), 4)
    assert [rows.tolist() for rows in found] == [[0], [2], [], [1]]


@pytest.fixture
def batches():
    """Rows of an expert in two batches of 10 and 20 tokens, of which every fifth is padding."""
    counted = [torch.arange(size) % 5 != 0 for size in (10, 20)]
    return [torch.tensor([1, 4]), torch.tensor([3])], counted


def test_enough_tokens_stay_as_they_are(batches):
    rows, counted = batches
    filled, tokens = filled_up(rows, counted, 3, ALONE)
    assert [a.tolist() for a in filled] == [[1, 4], [3]]
    assert tokens == ExpertTokens(3, 0)


def test_others_are_added_evenly_up_to_the_floor(batches):
    rows, counted = batches
    filled, tokens = filled_up(rows, counted, 10, ALONE)
    assert tokens == ExpertTokens(3, 7, evenly=True)
    # free: 2 3 6 7 8 9 of the first batch, 1 2 4 6 7 8 9 11 12 13 14 16 17 18 19 of the second; every third of them
    assert [a.tolist() for a in filled] == [[1, 2, 4, 7], [1, 3, 6, 9, 13, 17]]


def test_the_nearest_ones_are_added_where_that_is_known(batches):
    rows, counted = batches
    near = [
        torch.arange(10.0),
        torch.arange(20.0) - 11.5,
    ]  # padding (0, 5, 10, 15) and its own are as near, and not added
    filled, tokens = filled_up(rows, counted, 10, ALONE, lambda: near)
    assert tokens == ExpertTokens(3, 7)
    assert [a.tolist() for a in filled] == [[1, 4, 6, 7, 8, 9], [3, 17, 18, 19]]
    filled_up(
        rows, counted, 3, ALONE, lambda: pytest.fail("it is not asked where nothing is missing")
    )


def test_a_floor_above_all_tokens_takes_all_of_them(batches):
    rows, counted = batches
    filled, tokens = filled_up(rows, counted, 1000, ALONE)
    assert [a.tolist() for a in filled] == [real.nonzero().flatten().tolist() for real in counted]
    assert tokens == ExpertTokens(3, 21, evenly=True)
    every, same = all_rows(rows, counted, ALONE)
    assert [a.tolist() for a in every] == [a.tolist() for a in filled]
    assert same == ExpertTokens(3, 21)


SHARES = [[0], [1, 4], [2, 5, 3]]  # the numbers of the batches that each of three processes has


@pytest.mark.parametrize("near", [False, True])
def test_several_processes_add_the_tokens_that_one_would(near):
    sizes = (50, 40, 30, 1, 9, 20)
    counted = [torch.rand(size) > 0.2 for size in sizes]
    rows = [real.nonzero().flatten()[:: 7 + i] for i, real in enumerate(counted)]
    nearness = [(torch.rand(size) * 5).round() for size in sizes]  # many are as near as others
    floor = sum(map(len, rows)) + 30

    def of(processes, numbers):
        def given():
            return [nearness[i] for i in numbers]

        own = [[part[i] for i in numbers] for part in (rows, counted)]
        filled, tokens = filled_up(*own, floor, processes, given if near else None, numbers)
        return dict(zip(numbers, (part.tolist() for part in filled), strict=True)), tokens

    expected, tokens = of(ALONE, list(range(6)))
    assert tokens == ExpertTokens(floor - 30, 30, evenly=not near)
    ends = together(3, lambda processes: of(processes, SHARES[processes.rank]))
    assert [tokens for _, tokens in ends] == [ExpertTokens(floor - 30, 30, evenly=not near)] * 3
    assert {number: taken for found, _ in ends for number, taken in found.items()} == expected
    assert sum(map(len, expected.values())) == floor
