"""From how many tokens on a dense matmul is faster: the timing, and its effect on matmuls."""

from __future__ import annotations

import math
from itertools import chain, count

import pytest
import torch

from rac_modifier.kernels.cpu import crossover
from rac_modifier.kernels.cpu.crossover import measure_crossovers
from rac_modifier.kernels.cpu.operator import KINDS, use_crossovers
from rac_modifier.kernels.cpu.packed import pack_scale, set_activation_bits
from rac_modifier.kernels.cpu.support import library_and_isa, support
from tests.kernels.cpu.kernel_helpers import integers, multiply, scaled, threads

INT8_EIGHT = "int8 with 8-bit activations"


class Timed:
    """A library that records the tokens and the activation bits of what is timed, and multiplies
    nothing."""

    def __init__(self):
        (self.library, self.isa), self.calls = library_and_isa(), []

    def linear(self, data, *arguments):
        bits = self.library.activation_bits(data, self.isa)
        self.calls.append((arguments[2].shape[0], bits))


@pytest.mark.parametrize(
    ("ratios", "tokens"),
    [((1.0, 1.14, 0.5, 1.0), math.inf), ((1.0, 1.0, 1.2), 1023), ((2.0,), 63)],
)
def test_what_times_decide(best, monkeypatch, ratios, tokens):
    """`ratios`: time of the kernel over that of the dense matmul, for 64, 256, 1024 and 2048
    tokens."""
    library = Timed()
    spent = chain.from_iterable([0.0, r, r + 1.0] for r in ratios for _ in range(4))
    monkeypatch.setattr(crossover, "library_and_isa", lambda: (library, library.isa))
    monkeypatch.setattr(crossover, "expand_and_multiply", lambda *arguments: None)
    monkeypatch.setattr(crossover.time, "thread_time", lambda: next(spent))
    with threads(2):
        assert measure_crossovers(["floats"]) == {"floats": tokens}
        assert torch.get_num_threads() == 2
    assert next(spent, None) is None


def test_each_kind_is_timed_with_its_activations_until_a_dense_matmul_is_faster(best, monkeypatch):
    library, ticks = Timed(), count()
    monkeypatch.setattr(crossover, "library_and_isa", lambda: (library, library.isa))
    monkeypatch.setattr(crossover, "expand_and_multiply", lambda *arguments: None)
    monkeypatch.setattr(crossover.time, "thread_time", lambda: next(ticks))
    monkeypatch.setattr(crossover, "MARGIN", 0.0)  # any dense matmul is faster
    eight = 8 if support().multiplies_bytes else 16
    for kind, bits in zip(KINDS, (0, 16, 16, eight, eight), strict=True):
        library.calls.clear()
        assert measure_crossovers([kind]) == {kind: 63}
        assert set(library.calls) == {(64, bits)}


def runs_dense(weight, scale, tokens: int) -> bool:
    """Return whether a float32 x is not rounded."""
    x = torch.randn(tokens, 300, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ scaled(weight[0], scale).T
    error = multiply(x, weight[1], None, pack_scale(scale)) - exact
    return float(error.norm() / exact.norm()) < 1e-6


def test_which_matmuls_are_dense(best):
    weight, scale = integers("int8", 40, 300), torch.rand(40, 1) + 0.01
    use_crossovers({"int8": 20})
    for second_model in ({"int4": 64}, {}, {"floats": 9, INT8_EIGHT: 64}):
        use_crossovers(second_model)
        assert [runs_dense(weight, scale, tokens) for tokens in (20, 21)] == [False, True]
    use_crossovers({"int8": 0})  # up to 8 tokens are never dense
    assert [runs_dense(weight, scale, tokens) for tokens in (8, 9)] == [False, True]
    use_crossovers({"int8": 20, INT8_EIGHT: 30})
    set_activation_bits(weight[1].data, 8)
    last = 30 if support().multiplies_bytes else 20
    assert [runs_dense(weight, scale, tokens) for tokens in (last, last + 1)] == [False, True]
