"""Int8 and fp8 of any pattern with a scale per row and group of columns: where numbers and scales are, and the kernels.

The kernels are those of one scale per row with the scales of int4, so damage is tested there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from rac_gpu.layout import (
    UNSTRUCTURED_E4M3_GROUPS,
    UNSTRUCTURED_INT8_GROUPS,
    Layout,
    pack,
    units_of,
)
from rac_gpu.programs import expand_grid, expand_program, program, tiles_of
from rac_gpu.unstructured import expected_bytes, least_bytes
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight
from tests.emulate import emulate, product
from tests.test_unstructured_int8 import check_schedule, segments_of, unpack_slowly
from tests.weights import (
    AWKWARD,
    assert_product,
    fp8_weight,
    grouped_weight,
    int8_weight,
    skewed,
)

LAYOUTS = [*UNSTRUCTURED_INT8_GROUPS.values(), *UNSTRUCTURED_E4M3_GROUPS.values()]
# Every weight, every layout, every number of tokens and every program.
CASES = list(
    zip(
        AWKWARD,
        [*LAYOUTS, *LAYOUTS, *LAYOUTS],
        [1, 3, 8, 16, 17, 32, 16, 3, 1, 32, 8],
        strict=False,
    )
)


def maker(layout: Layout) -> Callable[..., StoredWeight]:
    return partial(grouped_weight, fp8_weight if layout.e4m3 else int8_weight, layout.group)


def name_of(value: object) -> str:
    return f"{value.title}-{value.group}" if isinstance(value, Layout) else str(value)


def scales_slowly(packed: Tensor, rows: int, columns: int, group: int) -> Tensor:
    """The scale of each weight, read where the description says that it is."""
    scale, order = torch.full((rows, columns), torch.nan), packed.view(torch.int32)[:rows].tolist()
    for segment in segments_of(packed, rows, group):
        for in_tile in range(32):
            row, (h, g) = segment.tile * 32 + in_tile, divmod(in_tile, 8)
            first = segment.first * 64
            for n, line in enumerate(segment.scales.tolist()):
                if row < rows:
                    scale[order[row], first + n * group : first + (n + 1) * group] = line[4 * g + h]
    return scale


@pytest.mark.parametrize("name", ["odd", "skewed", "leaning"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_each_number_and_scale_is_where_the_description_says(layout, name):
    weight = AWKWARD[name](maker(layout))
    packed, group = pack(weight, layout), layout.group
    dense, _ = unpack_slowly(packed, weight.rows, weight.columns, 0 if layout.e4m3 else 128, group)
    assert torch.equal(dense, weight.dense().view(torch.int8))
    expected = weight.scale.repeat_interleave(group, dim=1)
    assert torch.equal(scales_slowly(packed, weight.rows, weight.columns, group), expected)
    check_schedule(packed, weight.rows, group)


@pytest.mark.parametrize(("name", "layout", "tokens"), CASES, ids=name_of)
def test_the_kernel_multiplies(name, layout, tokens):
    weight = AWKWARD[name](maker(layout))
    tiles = 2, 1 if tokens <= 8 else 2 if tokens == 16 else 4
    x, bias = (
        torch.randn(tokens, weight.columns).to(torch.bfloat16),
        torch.randn(weight.rows).to(torch.bfloat16),
    )
    out, error = product(
        layout, program(layout, *tiles), pack(weight, layout), x, weight.rows, bias
    )
    assert error == ""
    assert_product(out, x, weight.dequantized(torch.float64), bias)


@pytest.mark.parametrize(
    ("name", "layout"), [("skewed", LAYOUTS[0]), ("odd", LAYOUTS[1]), ("half", LAYOUTS[2])]
)
def test_the_kernel_expands(name, layout):
    weight = AWKWARD[name](maker(layout))
    packed = pack(weight, layout)
    out = torch.full((weight.rows, weight.columns), torch.nan).to(torch.bfloat16)
    sizes = (weight.rows, weight.columns, 0, units_of(layout, packed, weight.columns), 0)
    grid = expand_grid(layout, *out.shape)
    assert emulate(layout, expand_program(layout), grid, packed, None, None, out, sizes) == ""
    assert torch.equal(out, weight.dequantized(torch.bfloat16))


@pytest.mark.parametrize("shared", [1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS[::3], ids=name_of)
def test_wider_groups_and_one_scale_per_row_are_repeated(layout, shared):
    weight = replace(maker(layout)(40, 512), scale=torch.rand(40, shared) + 0.1)
    x = torch.randn(3, 512).to(torch.bfloat16)
    out, error = product(layout, program(layout, 2, 1), pack(weight, layout), x, 40)
    assert error == ""
    assert_product(out, x, weight.dequantized(torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS[1::2], ids=name_of)
def test_a_token_has_the_same_bits_in_every_program(layout):
    weight = skewed(maker(layout), 40, 1024)
    packed, x = pack(weight, layout), torch.randn(8, 1024).to(torch.bfloat16)
    found = [
        product(layout, program(layout, *tiles), packed, x, 40)[0] for tiles in tiles_of(layout)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("density", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=name_of)
def test_the_expected_size_is_that_of_random_weights(layout, density):
    packed = pack(maker(layout)(128, 4096, density), layout)
    assert expected_bytes(128, 4096, density, layout.streams) == pytest.approx(
        packed.nbytes, rel=0.03
    )
    assert packed.nbytes >= least_bytes(128, 4096, layout.streams)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_other_groups_are_refused(layout):
    weight = replace(maker(layout)(20, 256), scale=torch.ones(20, 8))
    with pytest.raises(
        RacError,
        match="layer: a scale per 32 columns, or zero points, where the layout has a scale per",
    ):
        pack(weight, layout)
