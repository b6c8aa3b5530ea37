import math

import pytest

from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern


@pytest.mark.parametrize(
    ("structure", "sparsity", "n", "m", "expected"),
    [
        ("2:4", None, 2, 4, 0.5),
        ("1:4", None, 1, 4, 0.25),  # N is the number pruned
        ("1:3", None, 1, 3, 1 / 3),
        ("4:8", None, 4, 8, 0.5),
        ("0:0", 0.6, 0, 0, 0.6),
    ],
)
def test_parse(structure, sparsity, n, m, expected):
    pattern = Pattern.parse(structure, sparsity)
    assert (pattern.n, pattern.m, pattern.sparsity) == (n, m, pytest.approx(expected))
    assert pattern.mask_structure == structure
    assert pattern.is_structured is (m > 0)


@pytest.mark.parametrize(
    "structure",
    ["5:4", "4:4", "2:0", "0:4", "a:b", "2:4:8", "", "-2:4", "2:4\n", "²:4"],
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


def test_a_sparsity_next_to_n_of_m_is_refused_even_if_it_agrees():
    with pytest.raises(RacError, match=r'has no effect with mask_structure "2:4".*leave one out'):
        Pattern.parse("2:4", 0.5)


def test_describe():
    described = [p.describe() for p in (Pattern.n_of_m(2, 4), Pattern.unstructured(0.6))]
    assert described == [
        "2 of every 4 consecutive input weights are zero (50 %)",
        "60 % of the weights are zero, anywhere",
    ]


def test_check_shape_names_the_module():
    Pattern.unstructured(0.5).check_shape("x", 3, 5)
    Pattern.n_of_m(2, 4).check_shape("x", 3, 8)
    with pytest.raises(RacError, match=r"layers\.0\.q_proj.*\[3, 10\].*multiple of 4"):
        Pattern.n_of_m(2, 4).check_shape("layers.0.q_proj", 3, 10)
