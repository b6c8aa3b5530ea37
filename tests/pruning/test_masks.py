import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.pruning import Pattern, broken_groups, holds


@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 8), st.data())
def test_broken_groups_counts_one_by_one(rows, groups, m, data):
    n = data.draw(st.integers(1, m - 1))
    cells = rows * groups * m
    nonzero = torch.tensor(data.draw(st.lists(st.booleans(), min_size=cells, max_size=cells)))
    weight = nonzero.view(rows, groups * m).float() * -0.5
    expected = sum(
        int(weight[i, g * m : (g + 1) * m].count_nonzero()) > m - n
        for i in range(rows)
        for g in range(groups)
    )
    pattern = Pattern.n_of_m(n, m)
    assert broken_groups(weight, pattern) == expected
    assert holds(weight, pattern) == (expected == 0)


def test_nan_is_no_zero():
    assert broken_groups(torch.tensor([[0.0, math.nan, 1.0, 1.0]]), Pattern.n_of_m(2, 4)) == 1


def test_broken_groups_has_no_answer_for_unstructured():
    with pytest.raises(RacError, match="use holds"):
        broken_groups(torch.zeros(2, 4), Pattern.unstructured(0.5))


def test_holds_allows_for_rounding_only():
    pattern = Pattern.unstructured(0.5)
    weight = torch.ones(4, 300)
    weight.view(-1)[: 600 - 3] = 0  # one short in all rows but one
    assert holds(weight, pattern)
    weight.view(-1)[0] = 1
    assert not holds(weight, pattern)
    assert not holds(torch.ones(4, 300), pattern)
