import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.pruning import Pattern, broken_groups, holds


@pytest.mark.parametrize(
    ("structure", "sparsity", "n", "m", "expected"),
    [
        ("2:4", None, 2, 4, 0.5),
        ("2:4", 0.5, 2, 4, 0.5),
        ("1:4", None, 1, 4, 0.25),  # N is the number pruned
        ("1:3", 0.33, 1, 3, 1 / 3),
        ("4:8", None, 4, 8, 0.5),
        ("0:0", 0.6, 0, 0, 0.6),
    ],
)
def test_parse(structure, sparsity, n, m, expected):
    pattern = Pattern.parse(structure, sparsity)
    assert (pattern.n, pattern.m, pattern.sparsity) == (n, m, pytest.approx(expected))
    assert pattern.mask_structure == structure


@pytest.mark.parametrize(
    "structure", ["5:4", "4:4", "2:0", "0:4", "a:b", "2:4:8", "", "2", "-2:4", " 2:4", "2:4\n", "²:4"]
)
def test_parse_refuses_structures(structure):
    with pytest.raises(RacError) as error:
        Pattern.parse(structure, None)
    assert structure.strip() in str(error.value)
    assert 'use "2:4"' in str(error.value)


@pytest.mark.parametrize("sparsity", [None, 0, 0.0, -0.1, 1, 1.7, math.nan, math.inf])
def test_unstructured_refuses_sparsities(sparsity):
    with pytest.raises(RacError, match="sparsity"):
        Pattern.parse("0:0", sparsity)


@pytest.mark.parametrize("sparsity", [0.7, 0.0, math.nan, 0.25])
def test_contradicting_sparsity(sparsity):
    with pytest.raises(RacError, match=r"contradicts.*0:0"):
        Pattern.parse("2:4", sparsity)


def test_describe():
    assert Pattern.n_of_m(2, 4).describe() == "2 of every 4 consecutive input weights are zero (50 %)"
    assert Pattern.unstructured(0.6).describe() == "60 % of the weights are zero, anywhere"


def test_check_shape_names_the_module():
    Pattern.unstructured(0.5).check_shape("x", 3, 5)
    Pattern.n_of_m(2, 4).check_shape("x", 3, 8)
    with pytest.raises(RacError, match=r"layers\.0\.q_proj.*\[3, 10\].*multiple of 4"):
        Pattern.n_of_m(2, 4).check_shape("layers.0.q_proj", 3, 10)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(2, 8), st.data())
def test_broken_groups_counts_one_by_one(rows, groups, m, data):
    n = data.draw(st.integers(1, m - 1))
    cells = rows * groups * m
    nonzero = torch.tensor(data.draw(st.lists(st.booleans(), min_size=cells, max_size=cells)))
    weight = nonzero.view(rows, groups * m).float() * -0.5
    expected = sum(
        int(weight[i, g * m : (g + 1) * m].count_nonzero()) > m - n for i in range(rows) for g in range(groups)
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
