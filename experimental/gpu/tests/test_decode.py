"""The kernels' own sources, run in the emulator, against products in float64."""

from __future__ import annotations

import pytest
import torch
from rac_gpu.layout import (
    ALL,
    BF16,
    E4M3,
    INT4,
    INT4_FP32_SCALES,
    INT8,
    INT8_GROUPS,
    UNSTRUCTURED,
    UNSTRUCTURED_E4M3,
    UNSTRUCTURED_INT4,
    UNSTRUCTURED_INT8,
    Layout,
    pack,
    units_of,
)
from rac_gpu.programs import (
    all_programs,
    expand_grid,
    expand_program,
    program,
    tiles_of,
)

from tests.emulate import SOURCES, emulate, product, sites
from tests.weights import (
    assert_product,
    bf16_weight,
    fp8_weight,
    grouped_weight,
    int4_any_weight,
    int4_weight,
    int8_weight,
    kept_of_four,
    unstructured_weight,
)

# test_fp8.py has products in fp8. Scales in float32 are other bytes for the same loops: one size of group shows it.
SHOWN_ELSEWHERE = [INT4_FP32_SCALES[128], *(layout for layout in ALL if layout.e4m3)]
TILED = [
    (layout, tiles) for layout in ALL if layout not in SHOWN_ELSEWHERE for tiles in tiles_of(layout)
]


def name_of(value: object) -> str:
    return f"{value.title}-{value.group}" if isinstance(value, Layout) else str(value)


# Rows are no multiple of 16 or an odd number of tiles, columns none of 64, 128 or 256; one weight is smaller than a chunk.
SHAPES = [(3, 37, 904), (16, 48, 256), (17, 70, 136), (32, 16, 8), (33, 20, 640)]
LARGE = [
    (66, 134, 904),
    (40, 24, 128),
]  # more tokens than a tile holds, and more rows, or few of both


def weight_of(layout: Layout, rows: int, columns: int):
    if layout in UNSTRUCTURED_INT4.values():
        return int4_any_weight(layout.group, rows, columns)
    if layout.bits == 8:
        make = fp8_weight if layout.e4m3 else int8_weight
        density = 0.5 if layout.any_pattern else kept_of_four(rows, columns).float()
        return (
            grouped_weight(make, layout.group, rows, columns, density)
            if layout.group
            else make(rows, columns, density)
        )
    if not layout.group:
        return (unstructured_weight if layout.any_pattern else bf16_weight)(rows, columns)
    scales = torch.bfloat16 if layout.scale_bytes == 2 else torch.float32
    return int4_weight(rows, -(-columns // layout.group) * layout.group, layout.group, scales)


@pytest.mark.parametrize(("layout", "tiles"), TILED, ids=name_of)
def test_a_kernel_multiplies(layout, tiles):
    for tokens, rows, columns in [
        (1, 33, 264),
        (8, 40, 520),
        *SHAPES,
        *(LARGE if tiles[0] == 8 else []),
    ]:
        weight = weight_of(layout, rows, columns)
        x, bias = (
            torch.randn(tokens, weight.columns).to(torch.bfloat16),
            torch.randn(rows).to(torch.bfloat16),
        )
        bias = None if tokens == 16 else bias
        out, error = product(layout, program(layout, *tiles), pack(weight, layout), x, rows, bias)
        assert error == ""
        assert_product(out, x, weight.dequantized(torch.float64), bias)


@pytest.mark.parametrize("layout", ALL, ids=name_of)
def test_a_kernel_expands_a_part_of_the_rows(layout):
    rows, columns, first = layout.expanded_rows + 61, 264, layout.expanded_rows // 16
    weight = weight_of(layout, rows, columns)
    packed, dense = pack(weight, layout), weight.dequantized(torch.bfloat16)
    out = torch.full((rows - 16 * first, weight.columns), torch.nan, dtype=torch.bfloat16)
    sizes = (rows, weight.columns, 0, units_of(layout, packed, weight.columns), first)
    grid = expand_grid(layout, *out.shape)
    assert emulate(layout, expand_program(layout), grid, packed, None, None, out, sizes) == ""
    assert torch.equal(out, dense[16 * first :])


@pytest.mark.parametrize("most", [0, 1])
def test_fewer_than_two_of_four_may_be_stored(most):
    weight = bf16_weight(24, 200, most)
    x = torch.randn(5, 200).to(torch.bfloat16)
    out, error = product(BF16, program(BF16, 2, 1), pack(weight, BF16), x, 24)
    assert error == ""
    assert_product(out, x, weight.dequantized(torch.float64))


def test_rows_of_very_different_sizes_and_large_values():
    weight = bf16_weight(32, 256)
    scale = torch.logspace(-30, 30, 32).to(torch.bfloat16).repeat_interleave(128)
    weight.values.mul_(scale)
    x = torch.randn(2, 256).to(torch.bfloat16)
    out, error = product(BF16, program(BF16, 1, 1), pack(weight, BF16), x, 32)
    assert error == ""
    assert_product(out, x, weight.dequantized(torch.float64))


@pytest.mark.parametrize(
    "layout",
    [
        BF16,
        INT8,
        INT8_GROUPS[64],
        E4M3,
        INT4[128],
        UNSTRUCTURED,
        UNSTRUCTURED_INT8,
        UNSTRUCTURED_E4M3,
        UNSTRUCTURED_INT4[128],
    ],
    ids=name_of,
)
def test_a_nan_or_infinity_stays_in_its_token(layout):
    weight = weight_of(layout, 32, 256)
    x = torch.randn(3, 256).to(torch.bfloat16)
    x[1] = torch.nan
    x[2, ::2] = torch.inf
    out, error = product(layout, program(layout, 2, 1), pack(weight, layout), x, 32)
    assert error == ""
    assert_product(out[:1], x[:1], weight.dequantized(torch.float64))
    assert bool(out[1].isnan().all())
    assert not bool(out[2].isfinite().any())


@pytest.mark.parametrize(
    "layout",
    [
        BF16,
        INT8,
        INT8_GROUPS[128],
        E4M3,
        INT4[64],
        UNSTRUCTURED,
        UNSTRUCTURED_INT8,
        UNSTRUCTURED_E4M3,
        UNSTRUCTURED_INT4[64],
    ],
    ids=name_of,
)
def test_the_order_of_a_tokens_sums_follows_from_the_token_tiles_alone(layout):
    """So that one program for all numbers of tokens gives the same bits for a token alone and among others; and the row
    tiles do not matter, where as many warps share the columns: one, where they share the rows."""
    weight = weight_of(layout, 40, 640)
    packed, x = pack(weight, layout), torch.randn(20, 640).to(torch.bfloat16)
    by_warps = {}
    for tiles in [(rows, 4) for rows in (1, 2, 4, 8) if (rows, 4) in tiles_of(layout)]:
        chosen = program(layout, *tiles)
        every, _ = product(layout, chosen, packed, x, 40)
        alone, _ = product(layout, chosen, packed, x[7:8], 40)
        assert torch.equal(every[7:8], alone)
        assert torch.equal(every, by_warps.setdefault(chosen.split, every))


@pytest.mark.parametrize(
    "layout",
    [
        BF16,
        INT8,
        E4M3,
        INT4[128],
        UNSTRUCTURED,
        UNSTRUCTURED_INT8,
        UNSTRUCTURED_E4M3,
        UNSTRUCTURED_INT4[128],
    ],
    ids=name_of,
)
def test_a_barrier_or_wait_that_is_left_out_is_a_race(layout):
    """Each of them, in each kernel: one is needed where the ring is used again, another after a single chunk of each warp.

    In fp8 one kernel of each source shows it: they are those of int8.
    """
    at_end, *of_24 = barriers("decode.h")
    of_columns = {at_end, *(barriers("unstructured.h") if layout.any_pattern else of_24)}
    assert len(of_columns) == (3 if layout.any_pattern else 4)
    for tiles in [(2, 1)] if layout.e4m3 else tiles_of(layout):
        named = of_columns if program(layout, *tiles).split > 1 else set(barriers("wide.h"))
        assert len(named) >= 2
        caught = set()
        for columns in (256, 4096, 128):
            if caught == named:
                break
            weight = weight_of(layout, 32, columns)
            x, packed = torch.randn(9, columns).to(torch.bfloat16), pack(weight, layout)
            _, error = product(layout, program(layout, *tiles), packed, x, 32)
            assert error == ""
            assert set(sites(layout)) == named
            for site in named - caught:
                _, error = product(layout, program(layout, *tiles), packed, x, 32, skip=site)
                caught |= (
                    {site}
                    if error.startswith(("race", "read of shared memory that nobody wrote"))
                    else set()
                )
        assert caught == named


def barriers(source: str) -> list[str]:
    """Lines of a source with a barrier or a wait. The first one of decode.h is in every kernel."""
    lines = (SOURCES / source).read_text().splitlines()
    return [
        f"{source}:{n + 1}"
        for n, line in enumerate(lines)
        if any(w in line for w in ("SYNC_", "CP_ASYNC_WAIT"))
    ]


@pytest.mark.parametrize("layout", ALL, ids=name_of)
def test_a_program_needs_all_of_its_shared_memory_and_no_more(layout):
    weight = weight_of(layout, 32, 4096)
    x = torch.randn(1, 4096).to(torch.bfloat16)
    for each in all_programs(layout)[:-1]:
        _, error = product(
            layout, each, pack(weight, layout), x, 32, shared_bytes=each.shared_bytes - 16
        )
        assert error.startswith("access outside of shared memory")


def test_metadata_that_is_not_ordered_is_noticed():
    weight = bf16_weight(16, 64)
    packed = pack(weight, BF16)
    packed[1024] = packed[1024] & 0xF0 | 0b0001  # i0 = 1, i1 = 0
    _, error = product(
        BF16, program(BF16, 1, 1), packed, torch.ones(1, 64, dtype=torch.bfloat16), 16
    )
    assert error.startswith("metadata that is not ordered")


def test_what_lies_outside_of_a_buffer_or_misaligned_is_noticed():
    weight = bf16_weight(16, 128)
    packed, x = pack(weight, BF16), torch.ones(1, 128, dtype=torch.bfloat16)
    chosen = program(BF16, 1, 1)
    assert product(BF16, chosen, packed[:-16], x, 16)[1].startswith(
        "access outside of global memory"
    )
    shifted = torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(1, 128)
    assert product(BF16, chosen, packed, shifted, 16)[1].startswith(
        "misaligned access of 16 bytes to global"
    )
