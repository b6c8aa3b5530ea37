"""Which tokens an expert is calibrated on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.distributed.processes import Processes
from rac_modifier.llmcompressor.experts import ExpertTokens, filled_up, routed_rows
from tests.meeting import together

ALONE = Processes()


@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 2**31))
def test_each_expert_has_the_counted_tokens_that_chose_it(tokens, experts, seed):
    """A number beyond the experts is no expert: some routers give it to dropped tokens."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts + 2, generator=generator).topk(2).indices
    counted = torch.rand(tokens, generator=generator) > 0.3
    rows_by_expert = routed_rows(chosen, counted, experts)
    assert len(rows_by_expert) == experts
    for expert, rows in enumerate(rows_by_expert):
        expected = [t for t in range(tokens) if counted[t] and expert in chosen[t].tolist()]
        assert rows.tolist() == expected


# Rows of an expert in two batches of 10 and 20 tokens, of which every fifth is padding. Free are
# 2 3 6 7 8 9 of the first batch, 1 2 4 6 7 8 9 11 12 13 14 16 17 18 19 of the second.
COUNTED = [torch.arange(size) % 5 != 0 for size in (10, 20)]
ROWS = [torch.tensor([1, 4]), torch.tensor([3])]
NEAR = [torch.arange(10.0), torch.arange(20.0) - 11.5]
ALL = [counted.nonzero().flatten().tolist() for counted in COUNTED]


@pytest.mark.parametrize(
    ("floor", "near", "expected", "tokens"),
    [
        (3, None, [[1, 4], [3]], ExpertTokens(3, 0)),
        (10, lambda: NEAR, [[1, 4, 6, 7, 8, 9], [3, 17, 18, 19]], ExpertTokens(3, 7)),
        (1000, lambda: NEAR, ALL, ExpertTokens(3, 21)),
    ],
    ids=["enough", "nearest", "all"],
)
def test_free_tokens_are_added_up_to_the_floor(floor, near, expected, tokens):
    filled, counts = filled_up(ROWS, COUNTED, floor, ALONE, near, range(len(ROWS)))
    assert [rows.tolist() for rows in filled] == expected
    assert counts == tokens


SHARES = [[0], [1, 4], [2, 5, 3]]  # the numbers of the batches of each of three processes


def test_several_processes_add_the_tokens_that_one_would():
    sizes = (50, 40, 30, 1, 9, 20)
    counted = [torch.rand(size) > 0.2 for size in sizes]
    rows = [real.nonzero().flatten()[:: 7 + i] for i, real in enumerate(counted)]
    nearness = [(torch.rand(size) * 5).round() for size in sizes]  # with ties
    floor = sum(map(len, rows)) + 30

    def of(processes, numbers):
        batches = [[tensors[i] for i in numbers] for tensors in (rows, counted)]
        values = [nearness[i] for i in numbers]
        filled, tokens = filled_up(*batches, floor, processes, lambda: values, numbers)
        return dict(zip(numbers, (x.tolist() for x in filled), strict=True)), tokens

    expected, tokens = of(ALONE, list(range(6)))
    assert tokens == ExpertTokens(floor - 30, 30)
    assert sum(map(len, expected.values())) == floor
    results = together(3, lambda processes: of(processes, SHARES[processes.rank]))
    assert [counts for _, counts in results] == [tokens] * 3
    assert {number: x for filled, _ in results for number, x in filled.items()} == expected
