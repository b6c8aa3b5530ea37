import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.pruning.masks import (
    holds,
    lowest,
    lowest_along,
    ranks_in_groups,
    sampled_threshold,
)
from rac_modifier.settings.pattern import Pattern
from tests.pruning.pruning_reference import best_group


@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 8), st.data())
def test_n_of_m_holds_where_no_group_has_too_many_nonzeros(rows, groups, m, data):
    n = data.draw(st.integers(1, m - 1))
    cells = rows * groups * m
    nonzero = torch.tensor(data.draw(st.lists(st.booleans(), min_size=cells, max_size=cells)))
    weight = nonzero.view(rows, groups * m).float() * -0.5
    counts = [int(group.count_nonzero()) for row in weight for group in row.split(m)]
    assert holds(weight, Pattern.n_of_m(n, m)) == (max(counts) <= m - n)


def test_nan_is_no_zero():
    assert not holds(torch.tensor([[0.0, math.nan, 1.0, 1.0]]), Pattern.n_of_m(2, 4))


def test_an_unstructured_pattern_holds_but_for_rounding():
    pattern = Pattern.unstructured(0.5)
    weight = torch.ones(4, 300)
    weight.view(-1)[: 600 - 3] = 0  # one short in all rows but one
    assert holds(weight, pattern)
    weight.view(-1)[0] = 1
    assert not holds(weight, pattern)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
def test_lowest_is_exact_under_ties_and_strides(values, data):
    count = data.draw(st.integers(0, len(values)))
    scores = torch.tensor([values, values], dtype=torch.float32).T[:, :1]
    mask = lowest(scores, count)
    assert int(mask.sum()) == count
    assert sorted(scores[mask].tolist()) == sorted(values)[:count]


@given(st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8, unique=True), st.integers(1, 7))
def test_lowest_along_selects_the_best_group(values, n):
    mask = lowest_along(torch.tensor([values]).T, n, dim=0)
    assert tuple(mask[:, 0].nonzero()[:, 0].tolist()) == best_group(values, n)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.randoms())
def test_ranks_are_those_of_a_stable_sort(m, groups, columns, random):
    values = [[float(random.randint(0, 3)) for _ in range(columns)] for _ in range(groups * m)]
    ranks = ranks_in_groups(torch.tensor(values), m)
    for start in range(0, groups * m, m):
        for column in range(columns):
            group = [row[column] for row in values[start : start + m]]
            order = sorted(range(m), key=lambda i: group[i])
            expected = [order.index(i) for i in range(m)]
            assert ranks[start : start + m, column].tolist() == expected


def threshold(scores: torch.Tensor, share: float) -> float:
    return sampled_threshold(scores, torch.ones(len(scores), 1), share)


@given(st.integers(1, 50), st.integers(1, 50), st.floats(0.0, 1.0), st.integers(0, 99))
def test_the_threshold_of_a_small_matrix_is_exact(rows, columns, share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randperm(rows * columns, generator=generator).view(rows, columns).float()
    count = max(int(scores.numel() * share), 1)
    assert int((scores <= threshold(scores, share)).sum()) == count


@pytest.mark.parametrize("shape", [(300, 1331), (1, 400_000), (400_000, 1), (512, 4096)])
def test_the_threshold_of_a_large_matrix_is_close_whatever_its_order(shape):
    scores = torch.rand(shape) + torch.arange(shape[1]) % 8  # columns differ by their place
    share = (scores <= threshold(scores, 0.6)).float().mean()
    assert float(share) == pytest.approx(0.6, abs=0.015)
