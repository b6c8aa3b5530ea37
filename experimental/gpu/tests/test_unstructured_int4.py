"""Int4 weights of any pattern: where each number and scale is, the schedule of copies, and the kernel on awkward ones.

The oracles here are written from unstructured.h, windows.h and unstructured_int4.cu in rac_gpu/source/ and use none of the
packer's constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from rac_gpu.layout import UNSTRUCTURED_INT4, Layout, pack, units_of
from rac_gpu.programs import expand_grid, expand_program, program, tiles_of
from rac_gpu.unstructured import expected_bytes, least_bytes
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight, from_dense
from tests.emulate import emulate, product
from tests.weights import AWKWARD, assert_product, int4_any_weight, skewed

GROUPS = (64, 128)


@dataclass(frozen=True)
class Segment:
    """One segment as the description says where its parts are.

    masks [steps, 32, 2]; scales [steps x 64 / group, 32] float32; values [lines, 32, 8], nibbles.
    """

    tile: int
    first: int
    before: list[int]
    counts: list[int]
    masks: Tensor
    scales: Tensor
    values: Tensor


def segments_of(packed: Tensor, rows: int, group: int) -> Iterator[Segment]:
    tiles = -(-rows // 32)
    words = packed.view(torch.int32)
    units = words.view(-1, 32)
    for number in range(4 * tiles):
        begin, groups, where, before = words[32 * tiles + 4 * number :][:4].tolist()
        steps = where >> 16
        of_counts, of_scales = -(-steps // 128), steps * 64 // group
        counts = units[begin : begin + of_counts].contiguous().view(torch.uint8).flatten()
        masks = units[begin + of_counts :][: 2 * steps].reshape(steps, 32, 2)
        after = units[begin + of_counts + 2 * steps :]
        words_of_values = (
            after[of_scales : of_scales + 8 * groups].contiguous().view(torch.uint8).view(-1, 32, 4)
        )
        values = torch.stack([words_of_values & 15, words_of_values >> 4], dim=-1).flatten(2)
        assert not counts[steps:].any()
        early = [before >> shift & 255 for shift in (0, 8)]
        assert before >> 16 == 0
        scales = after[:of_scales].contiguous().view(torch.float32)
        yield Segment(
            number // 4, where & 65535, early, counts[:steps].tolist(), masks, scales, values
        )


def unpack_slowly(
    packed: Tensor, rows: int, columns: int, group: int
) -> tuple[Tensor, Tensor, int]:
    """The dense integers, read place by place; the scale of each; and how many zeros are stored."""
    dense, scale, zeros = (
        torch.zeros(rows, columns, dtype=torch.int8),
        torch.full((rows, columns), torch.nan),
        0,
    )
    order = packed.view(torch.int32)[:rows].tolist()
    assert sorted(order) == list(range(rows))
    for segment in segments_of(packed, rows, group):
        masks = (segment.masks.long() & 0xFFFFFFFF).tolist()
        values, scales = (
            segment.values.permute(1, 0, 2).flatten(1).tolist(),
            segment.scales.tolist(),
        )
        for lane in range(32):
            g, t, following = lane // 4, lane % 4, 0
            for step, mask in enumerate(masks):
                for i in range(2):
                    for j in range(4):
                        for q in range(2):
                            for k in range(4):
                                n, h = 2 * j + q, 2 * i + k % 2
                                row = segment.tile * 32 + 8 * h + g
                                column = (
                                    (segment.first + step) * 64 + 16 * t + 4 * j + 2 * q + k // 2
                                )
                                if row < rows and column < columns:
                                    scale[order[row], column] = scales[step * 64 // group][
                                        4 * g + h
                                    ]
                                if not mask[lane][i] >> (n % 4 + 16 * (n // 4) + 4 * k) & 1:
                                    continue
                                value = values[lane][following] - 8
                                following += 1
                                zeros += value == 0
                                if row < rows and column < columns:
                                    dense[order[row], column] = value
                                else:
                                    assert value == 0
    return dense, scale, zeros


def check_schedule(packed: Tensor, rows: int, group: int) -> None:
    """Goes through the steps as the ring does: 32 lines, groups of 8, copies of a step arrive two steps later. Of a stream that
    has read n values, line n // 8 and the one behind it may be in a window."""
    for segment in segments_of(packed, rows, group):
        bits = segment.masks[:, :, :, None] >> torch.arange(32) & 1
        per_step = bits.sum(dim=(2, 3))
        read = torch.cat([torch.zeros(1, 32, dtype=torch.int64), per_step.cumsum(0)])
        arrives = [8 * sum(segment.before[: n + 1]) for n in range(2)]
        for step in range(len(bits)):
            started = arrives[-1] + 8 * segment.counts[step]
            assert int(read[step + 1].max()) // 8 + 2 <= arrives[step], (
                "a line is read before its copy is waited for"
            )
            assert started - 32 <= int(read[step].min()) // 8, (
                "a line is overwritten before all have read it"
            )
            arrives.append(started)
        assert arrives[-1] == len(segment.values)
        assert len(bits) < 2 or len(segment.values) - (int(read[-1].max()) // 8 + 2) < 8


@pytest.fixture(params=GROUPS)
def group(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def layout(group: int) -> Layout:
    return UNSTRUCTURED_INT4[group]


@pytest.fixture(params=AWKWARD)
def weight(request: pytest.FixtureRequest, group: int) -> StoredWeight:
    return AWKWARD[request.param](lambda *shape: int4_any_weight(group, *shape))


def test_each_number_and_scale_is_where_the_description_says(weight, layout, group):
    packed = pack(weight, layout)
    dense, scale, _ = unpack_slowly(packed, weight.rows, weight.columns, group)
    assert torch.equal(dense, weight.dense())
    assert torch.equal(scale, weight.scale.repeat_interleave(group, dim=1)[:, : weight.columns])


def test_copies_arrive_in_time_and_overwrite_nothing(weight, layout, group):
    check_schedule(pack(weight, layout), weight.rows, group)


@pytest.mark.parametrize(
    ("group", "tokens"),
    [(128, 1), (64, 3), (64, 8), (128, 16), (64, 17), (128, 32)],
    indirect=["group"],
)
def test_the_kernel_multiplies(weight, layout, tokens):
    tiles = 2, 1 if tokens <= 8 else 2 if tokens == 16 else 4
    x, bias = (
        torch.randn(tokens, weight.columns).to(torch.bfloat16),
        torch.randn(weight.rows).to(torch.bfloat16),
    )
    packed, chosen = pack(weight, layout), program(layout, *tiles)
    out, error = product(layout, chosen, packed, x, weight.rows, bias)
    assert error == ""
    assert_product(out, x, weight.dequantized(torch.float64), bias)


def test_the_kernel_expands(weight, layout):
    packed = pack(weight, layout)
    out = torch.full((weight.rows, weight.columns), torch.nan).to(torch.bfloat16)
    sizes = (weight.rows, weight.columns, 0, units_of(layout, packed, weight.columns), 0)
    grid, chosen = expand_grid(layout, *out.shape), expand_program(layout)
    assert emulate(layout, chosen, grid, packed, None, None, out, sizes) == ""
    assert torch.equal(out, weight.dequantized(torch.bfloat16))


def test_every_nibble_is_its_number(layout, group):
    """All 16 values, one per row, times 1; a scale of 1."""
    values = torch.zeros(16, 128, dtype=torch.int8)
    values[:, 5] = torch.arange(-8, 8)
    weight = replace(from_dense(values, "layer"), scale=torch.ones(16, 128 // group), bits=4)
    x = torch.ones(1, 128, dtype=torch.bfloat16)
    out, error = product(layout, program(layout, 2, 1), pack(weight, layout), x, 16)
    assert error == ""
    assert out[0].tolist() == list(range(-8, 8))


@pytest.mark.parametrize("shared", [1, 2, 4])
def test_wider_groups_and_one_scale_per_row_are_repeated(layout, group, shared):
    """512 columns in groups of 512, 256 and 128 columns."""
    values = int4_any_weight(group, 40, 512)
    weight = replace(values, scale=torch.rand(40, shared) + 0.1)
    x = torch.randn(3, 512).to(torch.bfloat16)
    out, error = product(layout, program(layout, 2, 1), pack(weight, layout), x, 40)
    assert error == ""
    assert_product(out, x, weight.dequantized(torch.float64))


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
def test_large_and_small_activations_and_scales(layout, group, size):
    weight = int4_any_weight(group, 40, 256)
    weight = replace(weight, scale=weight.scale / size)
    x = (torch.randn(2, 256) * size).to(torch.bfloat16)
    out, error = product(layout, program(layout, 2, 1), pack(weight, layout), x, 40)
    assert error == ""
    assert_product(out, x, weight.dequantized(torch.float64))


def test_a_token_has_the_same_bits_in_every_program(layout, group):
    weight = skewed(lambda *shape: int4_any_weight(group, *shape), 40, 1024)
    packed, x = pack(weight, layout), torch.randn(8, 1024).to(torch.bfloat16)
    found = [
        product(layout, program(layout, *tiles), packed, x, 40)[0] for tiles in tiles_of(layout)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_two_of_four_is_hardly_padded(group):
    """Each lane stores as much as the others: a quarter of a byte, an eighth for the mask, the scales, and the ends of segments,
    some 9 lines in each of four per 32 rows."""
    kept = (torch.rand(512, 1024, 4).argsort(dim=-1) < 2).view(512, 4096)
    packed = pack(int4_any_weight(group, 512, 4096, kept.float()), UNSTRUCTURED_INT4[group])
    size = packed.numel() * packed.element_size() / (512 * 4096)
    assert size - 4 / group == pytest.approx(0.375 + 9 * 4 * 128 / (32 * 4096), abs=0.01)


def test_a_very_wide_weight_has_no_segment_of_more_steps_than_a_warp_can_count(layout, group):
    density = torch.zeros(65536)
    density[-128:] = 1.0
    packed = pack(int4_any_weight(group, 1, 65536, density), layout)
    assert [len(each.masks) for each in segments_of(packed, 1, group)] == [256] * 4
    check_schedule(packed, 1, group)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(128, 4096), (64, 8192)])
def test_the_expected_size_is_that_of_random_weights(layout, group, rows, columns, density):
    packed = pack(int4_any_weight(group, rows, columns, density), layout)
    size = packed.numel() * packed.element_size()
    assert expected_bytes(rows, columns, density, layout.streams) == pytest.approx(size, rel=0.03)
    assert size >= least_bytes(rows, columns, layout.streams)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: {"scale": None}, "layer: values of torch.int8, which the layout does not hold"),
        (
            lambda w: {"scale": torch.ones(20, 8)},
            "layer: a scale per 32 columns, or zero points, where the layout has",
        ),
        (
            lambda w: {"zeros": torch.zeros(20, 2, dtype=torch.uint8)},
            "layer: a scale per .* or zero points",
        ),
        (
            lambda w: {"values": w.values.clone().fill_(8)},
            "layer: values outside of -8 to 7, which 4 bits hold",
        ),
    ],
)
def test_what_it_does_not_hold_is_refused(layout, group, change, problem):
    weight = int4_any_weight(group, 20, 256)
    with pytest.raises(RacError, match=problem):
        pack(replace(weight, **change(weight)), layout)
