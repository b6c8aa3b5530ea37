"""Int8 weights of any pattern: where each number is, the schedule of copies, and the kernel on awkward ones.

The oracles here are written from unstructured.h, windows.h and unstructured_8bit.cu in rac_gpu/source/ and use none of the
packer's constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from rac_gpu.layout import UNSTRUCTURED_INT8, pack, units_of
from rac_gpu.programs import expand_grid, expand_program, program, tiles_of
from rac_gpu.unstructured import expected_bytes, least_bytes, shared_bytes
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight
from tests.emulate import emulate, product
from tests.weights import (
    AWKWARD,
    assert_product,
    bf16_weight,
    int8_weight,
    order_of,
    skewed,
)

INT8 = UNSTRUCTURED_INT8.streams


@dataclass(frozen=True)
class Segment:
    """One segment as the description says where its parts are. masks [steps, 32, 2]; values uint8 [lines, 32, 4]; scales
    [steps x 64 / group, 32] float32, none where a row has one scale."""

    tile: int
    first: int
    before: list[int]
    counts: list[int]
    masks: Tensor
    values: Tensor
    scales: Tensor


def segments_of(packed: Tensor, rows: int, group: int = 0) -> Iterator[Segment]:
    tiles = -(-rows // 32)
    words = packed.view(torch.int32)
    units = words.view(-1, 32)
    for number in range(4 * tiles):
        begin, groups, where, before = words[32 * tiles + 4 * number :][:4].tolist()
        steps = where >> 16
        of_counts, of_scales = -(-steps // 128), steps * 64 // group if group else 0
        counts = units[begin : begin + of_counts].contiguous().view(torch.uint8).flatten()
        masks = units[begin + of_counts :][: 2 * steps].reshape(steps, 32, 2)
        after = units[begin + of_counts + 2 * steps :]
        values = (
            after[of_scales : of_scales + 8 * groups].contiguous().view(torch.uint8).view(-1, 32, 4)
        )
        scales = after[:of_scales].contiguous().view(torch.float32)
        assert not counts[steps:].any()
        early = [before >> shift & 255 for shift in (0, 8)]
        assert before >> 16 == 0
        yield Segment(
            number // 4, where & 65535, early, counts[:steps].tolist(), masks, values, scales
        )


def unpack_slowly(
    packed: Tensor, rows: int, columns: int, lifted: int = 128, group: int = 0
) -> tuple[Tensor, int]:
    """The dense integers, read place by place; and how many zeros are stored. `lifted`: what a byte is more than its value."""
    dense, zeros = torch.zeros(rows, columns, dtype=torch.int8), 0
    order = packed.view(torch.int32)[:rows].tolist()
    assert sorted(order) == list(range(rows))
    for segment in segments_of(packed, rows, group):
        masks, values = (
            (segment.masks.long() & 0xFFFFFFFF).tolist(),
            segment.values.permute(1, 0, 2).flatten(1).tolist(),
        )
        for lane in range(32):
            g, t, following = lane // 4, lane % 4, 0
            for step, mask in enumerate(masks):
                for i in range(2):
                    for j in range(4):
                        for q in range(2):
                            for k in range(4):
                                n = 2 * j + q
                                if not mask[lane][i] >> (n % 4 + 16 * (n // 4) + 4 * k) & 1:
                                    continue
                                value = (values[lane][following] - lifted + 128) % 256 - 128
                                following += 1
                                row = segment.tile * 32 + 16 * i + 8 * (k % 2) + g
                                column = (
                                    (segment.first + step) * 64 + 16 * t + 4 * j + 2 * q + k // 2
                                )
                                zeros += value == 0
                                if row < rows and column < columns:
                                    dense[order[row], column] = value
                                else:
                                    assert value == 0
    return dense, zeros


def check_schedule(packed: Tensor, rows: int, group: int = 0) -> None:
    """Goes through the steps as the ring does: 64 lines, groups of 8, copies of a step arrive two steps later. Of a stream that
    has read n values, line n // 4 and the one behind it may be in a window."""
    for segment in segments_of(packed, rows, group):
        bits = segment.masks[:, :, :, None] >> torch.arange(32) & 1
        per_step = bits.sum(dim=(2, 3))
        read = torch.cat([torch.zeros(1, 32, dtype=torch.int64), per_step.cumsum(0)])
        arrives = [8 * sum(segment.before[: n + 1]) for n in range(2)]
        for step in range(len(bits)):
            started = arrives[-1] + 8 * segment.counts[step]
            assert int(read[step + 1].max()) // 4 + 2 <= arrives[step], (
                "a line is read before its copy is waited for"
            )
            assert started - 64 <= int(read[step].min()) // 4, (
                "a line is overwritten before all have read it"
            )
            arrives.append(started)
        assert arrives[-1] == len(segment.values)
        assert len(bits) < 2 or len(segment.values) - (int(read[-1].max()) // 4 + 2) < 8


@pytest.fixture(params=AWKWARD)
def weight(request: pytest.FixtureRequest) -> StoredWeight:
    return AWKWARD[request.param](int8_weight)


def exact(weight: StoredWeight) -> Tensor:
    """The dense weight in float64."""
    assert weight.scale is not None
    return weight.dense().double() * weight.scale.double()


def test_each_number_and_scale_is_where_the_description_says(weight):
    packed = pack(weight, UNSTRUCTURED_INT8)
    assert packed.dtype == torch.int8
    dense, _ = unpack_slowly(packed, weight.rows, weight.columns)
    assert torch.equal(dense, weight.dense())
    tiles = -(-weight.rows // 32)
    scales = packed[192 * tiles : 320 * tiles].clone().view(torch.float32)
    assert torch.equal(scales[: weight.rows], weight.scale[order_of(packed, weight.rows), 0])
    assert not scales[weight.rows :].any()


def test_copies_arrive_in_time_and_overwrite_nothing(weight):
    check_schedule(pack(weight, UNSTRUCTURED_INT8), weight.rows)


@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 17, 32])
def test_the_kernel_multiplies(weight, tokens):
    tiles = 2, 1 if tokens <= 8 else 2 if tokens == 16 else 4
    x, bias = (
        torch.randn(tokens, weight.columns).to(torch.bfloat16),
        torch.randn(weight.rows).to(torch.bfloat16),
    )
    packed, chosen = pack(weight, UNSTRUCTURED_INT8), program(UNSTRUCTURED_INT8, *tiles)
    out, error = product(UNSTRUCTURED_INT8, chosen, packed, x, weight.rows, bias)
    assert error == ""
    assert_product(out, x, exact(weight), bias)


def test_the_kernel_expands(weight):
    packed = pack(weight, UNSTRUCTURED_INT8)
    out = torch.full((weight.rows, weight.columns), torch.nan).to(torch.bfloat16)
    sizes = (weight.rows, weight.columns, 0, units_of(UNSTRUCTURED_INT8, packed, weight.columns), 0)
    grid, chosen = expand_grid(UNSTRUCTURED_INT8, *out.shape), expand_program(UNSTRUCTURED_INT8)
    assert emulate(UNSTRUCTURED_INT8, chosen, grid, packed, None, None, out, sizes) == ""
    assert torch.equal(out, weight.dequantized(torch.bfloat16))


def test_every_byte_is_its_number():
    """All 256 values, one per row, times 1: nothing is rounded but the result, which has eight bits."""
    values = torch.zeros(256, 8, dtype=torch.int8)
    values[:, 5] = torch.arange(-128, 128)
    weight = int8_weight(256, 8, 0.0)
    weight = replace(
        weight,
        values=values[:, 5].clone(),
        bitmask=torch.full((256, 1), 1 << 5, dtype=torch.uint8),
        starts=torch.arange(257),
        scale=torch.ones(256, 1),
    )
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    out, error = product(
        UNSTRUCTURED_INT8, program(UNSTRUCTURED_INT8, 2, 1), pack(weight, UNSTRUCTURED_INT8), x, 256
    )
    assert error == ""
    assert out[0].tolist() == list(range(-128, 128))


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e30])
def test_large_and_small_activations_and_scales(size):
    weight = int8_weight(40, 264)
    weight = replace(weight, scale=weight.scale / size)
    x = (torch.randn(2, 264) * size).to(torch.bfloat16)
    packed = pack(weight, UNSTRUCTURED_INT8)
    out, error = product(UNSTRUCTURED_INT8, program(UNSTRUCTURED_INT8, 2, 1), packed, x, 40)
    assert error == ""
    assert_product(out, x, exact(weight))


def test_a_token_has_the_same_bits_in_every_program():
    weight = skewed(int8_weight, 40, 1024)
    packed, x = pack(weight, UNSTRUCTURED_INT8), torch.randn(8, 1024).to(torch.bfloat16)
    each = [program(UNSTRUCTURED_INT8, *tiles) for tiles in tiles_of(UNSTRUCTURED_INT8)]
    found = [product(UNSTRUCTURED_INT8, chosen, packed, x, 40)[0] for chosen in each]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_zeros_are_stored_only_for_streams_that_would_stay_behind():
    for name, some in [("leaning", True), ("half", False), ("full", False)]:
        made = AWKWARD[name](int8_weight)
        _, zeros = unpack_slowly(pack(made, UNSTRUCTURED_INT8), made.rows, made.columns)
        assert bool(zeros) == some


def test_two_of_four_is_hardly_padded():
    """Each lane stores as much as the others: half a byte, an eighth for the mask, and the ends of segments."""
    kept = (torch.rand(512, 1024, 4).argsort(dim=-1) < 2).view(512, 4096)
    packed = pack(int8_weight(512, 4096, kept.float()), UNSTRUCTURED_INT8)
    assert packed.numel() / (512 * 4096) < 0.67


def test_a_very_wide_weight_has_no_segment_of_more_steps_than_a_warp_can_count():
    density = torch.zeros(65536)
    density[-128:] = 1.0
    packed = pack(int8_weight(1, 65536, density), UNSTRUCTURED_INT8)
    assert [len(each.masks) for each in segments_of(packed, 1)] == [256] * 4
    check_schedule(packed, 1)


def test_enough_bytes_are_under_way():
    """Copies of two steps are unfinished while a third is computed. An H100 needs some 20 KB per multiprocessor and has 227
    KB of shared memory; fewer warps than fit run where a layer has few rows, at least 4."""
    for each in segments_of(pack(int8_weight(64, 4096), UNSTRUCTURED_INT8), 64):
        per_step = 1024 * (sum(each.before) + sum(each.counts)) / len(each.counts) + 256 + 1024
        warps = 4 * (227 * 1024 // (shared_bytes(1, INT8) + 1024))
        assert 2 * per_step * warps > 20_000
        assert 2 * per_step * 4 > 15_000


@pytest.mark.parametrize("density", [0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(128, 4096), (64, 8192)])
def test_the_expected_size_is_that_of_random_weights(rows, columns, density):
    size = pack(int8_weight(rows, columns, density), UNSTRUCTURED_INT8).numel()
    assert expected_bytes(rows, columns, density, INT8) == pytest.approx(size, rel=0.03)
    assert size >= least_bytes(rows, columns, INT8)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda w: {"values": w.values[:-1]},
            r"layer: \d+ values in rows that start at other places .* damaged",
        ),
        (
            lambda w: {"starts": w.starts[:-1]},
            r"layer: \d+ values in rows that start at other places .* damaged",
        ),
        (
            lambda w: {"bitmask": w.bitmask ^ 1},
            r"layer: \d+ values in rows that start at other places .* damaged",
        ),
        (lambda w: {"scale": None}, "layer: values of torch.int8, which the layout does not hold"),
        (
            lambda w: {"values": w.values.bfloat16()},
            "layer: values of torch.bfloat16, which the layout does not hold",
        ),
        (
            lambda w: {"scale": torch.ones(20, 2)},
            "layer: a scale per 32 columns, or zero points, where the layout has one",
        ),
        (
            lambda w: {"zeros": torch.zeros(20, 1, dtype=torch.uint8)},
            "layer: a scale per 64 columns, or zero points",
        ),
        (
            lambda w: {"columns": 70000},
            "layer: 70000 columns; the kernel has at most 65536; keep it dense",
        ),
    ],
)
def test_what_it_does_not_hold_or_is_damaged_is_refused(change, problem):
    weight = int8_weight(20, 64)
    with pytest.raises(RacError, match=problem):
        pack(replace(weight, **change(weight)), UNSTRUCTURED_INT8)
    with pytest.raises(RacError, match=r"layer: values of torch.bfloat16"):
        pack(bf16_weight(16, 64), UNSTRUCTURED_INT8)
