"""From how many rows on a dense product is faster: what times decide, the timing itself, and its effect on products."""

from __future__ import annotations

import math

import pytest
import torch

from rac_modifier.kernels.cpu import crossover
from rac_modifier.kernels.cpu.crossover import ROWS, Crossover, measure_crossovers, rows_up_to
from rac_modifier.kernels.cpu.operator import forget_crossovers, use_crossovers
from rac_modifier.kernels.cpu.packed import pack_scale, set_activation_bits
from rac_modifier.kernels.cpu.support import library_and_isa, support
from tests.kernels.cpu.kernel_helpers import integers, multiply, scaled, threads

SIXTEEN = ["floats", "int8", "int4"]
EIGHT = ["int8 with 8-bit activations", "int4 with 8-bit activations"]


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        ({64: (1.0, 2.0), 256: (1.0, 1.0), 1024: (1.1, 1.0)}, math.inf),  # within the margin
        ({64: (1.0, 2.0), 256: (1.0, 1.0), 1024: (1.2, 1.0)}, 1023),
        ({64: (1.0, 2.0), 256: (2.0, 1.0)}, 255),
        ({64: (2.0, 1.0)}, 63),
    ],
)
def test_what_times_decide(seconds, rows):
    assert rows_up_to(seconds) == rows


def test_timed_on_the_kernel_in_use(best):
    with threads(2):
        found = measure_crossovers([*SIXTEEN, *EIGHT])
        assert torch.get_num_threads() == 2
    assert [each.kind for each in found] == [*SIXTEEN, *EIGHT]
    for each in found:
        assert list(each.seconds) == list(ROWS[: len(each.seconds)])
        assert all(0 < time < 10 for both in each.seconds.values() for time in both)
        assert each.rows == rows_up_to(each.seconds)
        assert (len(each.seconds) == len(ROWS)) or not math.isinf(each.rows)


class Seen:
    """A library that records the tokens and the activation bits of what is timed."""

    def __init__(self, library, isa):
        self.library, self.isa, self.calls = library, isa, []

    def linear(self, data, *arguments):
        bits = self.library.activation_bits(data, self.isa)
        self.calls.append((arguments[2].shape[0], bits))
        self.library.linear(data, *arguments)

    def __getattr__(self, name):
        return getattr(self.library, name)


def test_each_kind_is_timed_with_its_activations_until_a_dense_matmul_is_faster(best, monkeypatch):
    library, isa = library_and_isa()
    eight = 8 if support().multiplies_bytes else 16
    kinds = dict(zip([*SIXTEEN, *EIGHT], (0, 16, 16, eight, eight), strict=True))
    monkeypatch.setattr(crossover, "MARGIN", 0.0)  # any dense matmul is faster
    for kind, bits in kinds.items():
        seen = Seen(library, isa)
        monkeypatch.setattr(crossover, "library_and_isa", lambda seen=seen: (seen, isa))
        (measured,) = measure_crossovers([kind])
        assert measured.rows == ROWS[0] - 1
        assert set(seen.calls) == {(ROWS[0], bits)}


def test_described_with_its_figures():
    text = Crossover("int8", 256, {64: (0.001, 0.002), 256: (0.003, 0.0031)}).describe()
    assert text == (
        "int8: the kernel multiplies up to 256 rows, more by dense products "
        "(ms of the kernel / of a dense product: 64 rows 1.0 / 2.0, 256 rows 3.0 / 3.1)"
    )
    assert "multiplies any number of rows (ms" in Crossover("int4", math.inf, {}).describe()


def runs_dense(weight, scale, rows: int) -> bool:
    """Whether a float32 x of so many rows is not rounded."""
    x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(0))
    use = multiply(x, weight[1], None, pack_scale(scale))
    exact = x.double() @ scaled(weight[0], scale).T
    return float((use - exact).norm() / exact.norm()) < 1e-6


def test_a_second_model_leaves_the_kinds_that_it_does_not_have(best):
    weight, scale = integers("int8", 40, 300), torch.rand(40, 1) + 0.01
    use_crossovers({"int8": 20})
    for second in ({"int4": 64}, {}, {"floats": 9, EIGHT[0]: 64}):
        use_crossovers(second)
        assert [runs_dense(weight, scale, rows) for rows in (20, 21)] == [False, True]
    use_crossovers({"int8": 30})  # measured again
    assert [runs_dense(weight, scale, rows) for rows in (21, 30, 31)] == [False, False, True]
    forget_crossovers()
    assert not runs_dense(weight, scale, 31)


def test_activations_of_8_bits_have_a_number_of_their_own(best):
    weight, scale = integers("int8", 40, 300), torch.rand(40, 1) + 0.01
    set_activation_bits(weight[1].data, 8)
    use_crossovers({"int8": 20, EIGHT[0]: 30})
    last = 30 if support().multiplies_bytes else 20
    assert [runs_dense(weight, scale, rows) for rows in (last, last + 1)] == [False, True]


def test_up_to_8_tokens_are_never_dense(best):
    weight, scale = integers("int8", 40, 300), torch.rand(40, 1) + 0.01
    use_crossovers({"int8": 0})
    assert [runs_dense(weight, scale, rows) for rows in (8, 9)] == [False, True]
