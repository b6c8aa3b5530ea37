"""The bitmask layout against loops over bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.formats import bitmask
from rac_modifier.formats.bitmask import (
    DTYPES,
    compress,
    expand,
    most_of_four,
    nonzero,
    row_counts,
)
from tests.checkpoint.checkpoint_helpers import same_bits

INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def random_weight(rows, columns, dtype, density, seed):
    """Draw bit patterns, infinities and NaNs too; a share `density` of them is not +0.0."""
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns * dtype.itemsize
    codes = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    weight = codes.view(dtype).view(rows, columns)
    zero = torch.rand(rows, columns, generator=generator) >= density
    weight.view(INTEGER[dtype.itemsize])[zero] = 0
    return weight


def slow_pack(weight: torch.Tensor) -> tuple[list[int], list[list[int]], list[int]]:
    """Return the bits of stored values in row order, bytes of the mask, and row starts."""
    values: list[int] = []
    mask, offsets = [], []
    for row in weight.view(INTEGER[weight.element_size()]).tolist():
        offsets.append(len(values))
        packed = [0] * -(-len(row) // 8)
        for column, bits in enumerate(row):
            if bits != 0:
                packed[column // 8] |= 1 << (column % 8)
                values.append(bits)
        mask.append(packed)
    return values, mask, offsets


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 41),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
    block=st.sampled_from([1, 30, 200, 1 << 20]),
)
def test_the_layout_is_that_of_the_loops_and_comes_back(rows, columns, dtype, density, seed, block):
    """Also where a row is longer than a block."""
    weight = random_weight(rows, columns, dtype, density, seed)
    before = weight.clone()
    values, mask, offsets = slow_pack(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmask, "_BLOCK", block)
        stored, bits = compress(weight, len(values), lambda part: bitmask.as_integers(part) != 0)
        restored = expand(stored, bits, columns)
    assert same_bits(weight, before)
    assert stored.view(INTEGER[dtype.itemsize]).tolist() == values
    assert bits.tolist() == mask
    assert row_counts(bits).cumsum(0).tolist() == [*offsets[1:], len(values)]
    assert same_bits(restored, weight)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 3), fours=st.integers(1, 5), seed=st.integers(0, 10_000))
def test_counts_of_four(rows, fours, seed):
    mask = torch.rand(rows, 4 * fours, generator=torch.Generator().manual_seed(seed)) < 0.5
    _, bits = compress(mask.float(), int(mask.sum()), lambda part: part != 0)
    counts = mask.view(-1, 4).sum(dim=1)
    assert most_of_four(bits) == int(counts.max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonzero_knows_both_zeros(dtype):
    weight = torch.tensor([0.0, -0.0, 1.0, -2.0]).to(dtype)
    assert nonzero(weight).tolist() == [False, False, True, True]
    assert nonzero(torch.tensor([-128], dtype=torch.int8)).tolist() == [True]
