"""Values of fp8 (e4m3): every code, products, placement, and what is refused; 2:4 and of any pattern.

The sources are int8's with another conversion, so shapes, schedules and damage are tested in few cases here, and fully for int8.
Each program of 2:4 and of any pattern, with a scale per row, multiplies one weight at least.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rac_gpu import schedule
from rac_gpu.layout import (
    E4M3,
    E4M3_GROUPS,
    INT8,
    UNSTRUCTURED_E4M3,
    UNSTRUCTURED_INT8,
    Layout,
    pack,
    units_of,
)
from rac_gpu.programs import expand_grid, expand_program, program, tiles_of
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight, from_dense
from tests.emulate import emulate, product
from tests.test_unstructured_int8 import check_schedule, unpack_slowly
from tests.weights import (
    AWKWARD,
    assert_product,
    fp8_weight,
    grouped_weight,
    int8_weight,
    kept_of_four,
)

FP8 = torch.float8_e4m3fn
BOTH = pytest.mark.parametrize("layout", [E4M3, UNSTRUCTURED_E4M3], ids=lambda layout: layout.title)


def number(code: int) -> float:
    """What a code stands for, from the definition of e4m3: bias 7, no infinity, two NaNs."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    return sign * (
        2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
    )


FINITE = [code for code in range(256) if code & 127 != 127]


def of_codes(codes: Tensor, scale: Tensor | None = None) -> StoredWeight:
    stored = from_dense(codes.to(torch.uint8).view(FP8), "layer")
    return replace(stored, scale=torch.ones(len(codes), 1) if scale is None else scale)


def every_code(layout: Layout) -> tuple[StoredWeight, Tensor]:
    """A weight [254, 8] with every finite code in each of its columns, or in half of them; and its numbers in float64."""
    places = torch.arange(254)[:, None] + torch.arange(8) * 31
    codes = torch.tensor(FINITE)[places % 254]
    if not layout.any_pattern:
        pattern = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1], [1, 0, 0, 1, 0, 1, 1, 0]]).bool()
        codes = codes.masked_fill(
            ~pattern[torch.arange(254) // 8 % 2], 0
        )  # rows g and g + 8 differ
    dense = torch.tensor(
        [[number(code) for code in row] for row in codes.tolist()], dtype=torch.float64
    )
    return of_codes(codes), dense


@BOTH
def test_every_code_is_its_number(layout):
    """Times one column at a time and a scale of 1: nothing is rounded, since bf16 holds all of them. Subnormal ones too."""
    weight, dense = every_code(layout)
    out, error = product(
        layout, program(layout, 2, 1), pack(weight, layout), torch.eye(8).to(torch.bfloat16), 254
    )
    assert error == ""
    assert torch.equal(out.double().T, dense)
    assert len(dense.unique()) == 253  # two zeros
    assert float(dense[dense > 0].min()) == 2.0**-9
    assert float(dense.max()) == 448.0


@BOTH
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_every_code_is_expanded(layout, size):
    weight, dense = every_code(layout)
    weight = replace(weight, scale=(torch.rand(254, 1) + 0.1) * size)
    packed, out = pack(weight, layout), torch.full((254, 8), torch.nan).to(torch.bfloat16)
    sizes = (254, 8, 0, units_of(layout, packed, 8), 0)
    assert (
        emulate(
            layout,
            expand_program(layout),
            expand_grid(layout, 254, 8),
            packed,
            None,
            None,
            out,
            sizes,
        )
        == ""
    )
    expected = (dense.float() * weight.scale).to(torch.bfloat16)
    assert torch.equal(out, expected)
    assert torch.equal(weight.dequantized(torch.bfloat16), expected)


# Every awkward weight, each with one number of tokens, which gives the program: all three.
PAIRS = list(zip(AWKWARD, [1, 3, 8, 16, 17, 32, 16, 3, 1, 32, 8], strict=True))


def tiles_for(tokens: int) -> tuple[int, int]:
    return 2, 1 if tokens <= 8 else 2 if tokens == 16 else 4


@pytest.mark.parametrize(("name", "tokens"), PAIRS)
def test_the_kernel_of_any_pattern_multiplies(name, tokens):
    weight, layout = AWKWARD[name](fp8_weight), UNSTRUCTURED_E4M3
    tiles = tiles_for(tokens)
    x, bias = (
        torch.randn(tokens, weight.columns).to(torch.bfloat16),
        torch.randn(weight.rows).to(torch.bfloat16),
    )
    out, error = product(
        layout, program(layout, *tiles), pack(weight, layout), x, weight.rows, bias
    )
    assert error == ""
    assert_product(out, x, weight.dense().double() * weight.scale.double(), bias)


SHAPES_24 = [
    (33, 264, 1, (1, 1), 2),
    (37, 904, 3, (2, 1), 2),
    (40, 520, 8, (2, 1), 1),
    (48, 256, 16, (1, 2), 2),
    (48, 392, 16, (2, 2), 2),
    (70, 136, 17, (1, 4), 2),
    (16, 8, 32, (2, 4), 2),
    (20, 200, 3, (1, 1), 0),
    (70, 264, 5, (4, 1), 2),
    (66, 904, 13, (4, 2), 2),
    (40, 136, 29, (4, 4), 2),
    (134, 648, 35, (8, 4), 2),  # two blocks along the rows, and two along the tokens
    (40, 264, 66, (8, 8), 2),
]


def test_every_program_has_a_weight():
    assert {tiles for _, _, _, tiles, _ in SHAPES_24} == set(tiles_of(E4M3))
    assert {tiles_for(tokens) for _, tokens in PAIRS} == set(tiles_of(UNSTRUCTURED_E4M3))


@pytest.mark.parametrize(("rows", "columns", "tokens", "tiles", "most"), SHAPES_24)
def test_the_kernel_of_2_of_4_multiplies(rows, columns, tokens, tiles, most):
    weight = fp8_weight(rows, columns, kept_of_four(rows, columns, most).float())
    x, bias = torch.randn(tokens, columns).to(torch.bfloat16), torch.randn(rows).to(torch.bfloat16)
    out, error = product(E4M3, program(E4M3, *tiles), pack(weight, E4M3), x, rows, bias)
    assert error == ""
    assert_product(out, x, weight.dense().double() * weight.scale.double(), bias)


@pytest.mark.parametrize(
    ("tokens", "tiles"),
    [
        (1, (1, 1)),
        (8, (2, 1)),
        (3, (4, 1)),
        (16, (1, 2)),
        (17, (2, 4)),
        (9, (4, 2)),
        (20, (8, 4)),
        (40, (8, 8)),
    ],
)
@pytest.mark.parametrize("group", [64, 128])
def test_the_kernel_of_2_of_4_multiplies_with_scales_of_groups(group, tokens, tiles):
    weight = grouped_weight(fp8_weight, group, 37, 456, kept_of_four(37, 456).float())
    x, layout = torch.randn(tokens, weight.columns).to(torch.bfloat16), E4M3_GROUPS[group]
    out, error = product(layout, program(layout, *tiles), pack(weight, layout), x, 37)
    assert error == ""
    assert_product(out, x, weight.dequantized(torch.float64))


@BOTH
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_large_and_small_activations_and_scales(layout, size):
    weight = fp8_weight(40, 264, kept_of_four(40, 264).float())
    weight = replace(weight, scale=weight.scale / size)
    x = (torch.randn(2, 264) * size).to(torch.bfloat16)
    out, error = product(layout, program(layout, 2, 1), pack(weight, layout), x, 40)
    assert error == ""
    assert_product(out, x, weight.dense().double() * weight.scale.double())


def as_int8(weight: StoredWeight) -> StoredWeight:
    """The same bytes, as the int8 kernels' packer stores them: it adds 128."""
    return replace(weight, values=weight.values.view(torch.int8) ^ -128)


def test_bytes_are_where_those_of_int8_are():
    weight = fp8_weight(37, 392, kept_of_four(37, 392).float())
    packed, expected = pack(weight, E4M3), pack(as_int8(weight), INT8)
    assert packed.dtype == torch.uint32
    units = 3 * 4 * 1280
    values = torch.arange(units) % 1280 < 1024
    found, expected = packed.view(torch.uint8), expected.clone()
    assert (
        int((found[:units] != expected[:units]).sum()) > 0
    )  # what is not stored: 0, where int8 has 128
    expected[:units] = torch.where(values & (found[:units] == 0), 0, expected[:units])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["odd", "skewed", "full"])
def test_each_byte_of_any_pattern_is_where_the_description_says(name):
    weight = AWKWARD[name](fp8_weight)
    packed = pack(weight, UNSTRUCTURED_E4M3)
    assert packed.dtype == torch.uint16
    dense, _ = unpack_slowly(packed, weight.rows, weight.columns, lifted=0)
    assert torch.equal(dense, weight.dense().view(torch.int8))
    check_schedule(packed, weight.rows)
    assert replace(schedule.E4M3, dtype=torch.int8) == schedule.INT8


def test_a_checkpoints_negative_zeros_are_zeros():
    codes = torch.zeros(16, 8, dtype=torch.int64)
    codes[:, 0], codes[:, 1] = 128, torch.arange(16) + 130
    for layout in (E4M3, UNSTRUCTURED_E4M3):
        out, error = product(
            layout,
            program(layout, 2, 1),
            pack(of_codes(codes), layout),
            torch.eye(8).bfloat16(),
            16,
        )
        assert error == ""
        assert not out[0].any()
        assert out[1].tolist() == [number(code) for code in range(130, 146)]


@BOTH
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda w: {
                "values": torch.where(
                    w.values.view(torch.uint8) > 200, 127, w.values.view(torch.uint8)
                )
            },
            "NaN",
        ),
        (
            lambda w: {
                "values": torch.where(
                    w.values.view(torch.uint8) > 200, 255, w.values.view(torch.uint8)
                )
            },
            "NaN",
        ),
        (
            lambda w: {"values": w.values.view(torch.float8_e5m2)},
            "values of torch.float8_e5m2, which the layout",
        ),
        (lambda w: {"values": w.values.view(torch.int8)}, "values of torch.int8, which the layout"),
        (lambda w: {"scale": None}, "values of torch.float8_e4m3fn, which the layout"),
        (lambda w: {"scale": torch.ones(20, 2)}, "a scale per 32 columns"),
    ],
)
def test_what_it_does_not_hold_is_refused(layout, change, problem):
    weight = fp8_weight(20, 64, kept_of_four(20, 64).float())
    changed = change(weight)
    if "NaN" in problem:
        changed["values"] = changed["values"].to(torch.uint8).view(FP8)
        problem = (
            "values that are NaN, which the GPU kernels do not have; the checkpoint is damaged"
        )
    with pytest.raises(RacError, match=f"layer: {problem}"):
        pack(replace(weight, **changed), layout)


def test_int8_layouts_do_not_hold_it():
    weight = fp8_weight(20, 64, kept_of_four(20, 64).float())
    for layout in (INT8, UNSTRUCTURED_INT8):
        with pytest.raises(
            RacError, match=r"layer: values of torch\.float8_e4m3fn, which the layout"
        ):
            pack(weight, layout)
    with pytest.raises(
        RacError, match=r"layer: values of torch\.int8, which the layout 2:4 fp8 does not hold"
    ):
        pack(int8_weight(20, 64, kept_of_four(20, 64).float()), E4M3)
