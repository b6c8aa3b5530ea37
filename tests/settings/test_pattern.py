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


def test_check_shape_names_the_module():
    Pattern.unstructured(0.5).check_shape("x", 3, 5)
    Pattern.n_of_m(2, 4).check_shape("x", 3, 8)
    with pytest.raises(RacError, match=r"layers\.0\.q_proj.*\[3, 10\].*multiple of 4"):
        Pattern.n_of_m(2, 4).check_shape("layers.0.q_proj", 3, 10)
