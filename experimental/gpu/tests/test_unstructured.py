"""Weights of any pattern: where each number is, the schedule of copies, and the kernel on awkward ones.

The oracles here are written from rac_gpu/source/unstructured.h and unstructured_bf16.cu and use none of the packer's constants.
test_unstructured_int8.py, test_unstructured_int4.py and test_fp8.py have other values, test_unstructured_damage.py wrong bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from rac_gpu.layout import UNSTRUCTURED, pack, units_of
from rac_gpu.programs import expand_grid, expand_program, program, tiles_of
from rac_gpu.unstructured import expected_bytes, least_bytes
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight, from_dense
from tests.emulate import emulate, product
from tests.weights import (
    AWKWARD,
    assert_product,
    int4_weight,
    order_of,
    skewed,
    unstructured_weight,
)


@dataclass(frozen=True)
class Segment:
    """One segment as the description says where its parts are. masks [steps, 32]; values [lines, 32, 2], as int16."""

    tile: int
    first: int
    before: list[int]
    counts: list[int]
    masks: Tensor
    values: Tensor
    end: int  # in units


def segments_of(packed: Tensor, rows: int) -> list[Segment]:
    tiles = -(-rows // 32)
    units, found = packed.view(-1, 32), []
    for number in range(4 * tiles):
        begin, groups, where, before = packed[32 * tiles + 4 * number :][:4].tolist()
        steps = where >> 16
        of_counts = -(-steps // 128)
        counts = units[begin : begin + of_counts].contiguous().view(torch.uint8).flatten()
        masks = units[begin + of_counts :][:steps]
        values = (
            units[begin + of_counts + steps :][: 8 * groups]
            .contiguous()
            .view(torch.int16)
            .view(-1, 32, 2)
        )
        end = begin + of_counts + steps + 8 * groups
        early = [before >> shift & 255 for shift in (0, 8, 16)]
        found.append(
            Segment(number // 4, where & 65535, early, counts[:steps].tolist(), masks, values, end)
        )
        assert not counts[steps:].any()
    return found


def unpack_slowly(packed: Tensor, rows: int, columns: int) -> tuple[Tensor, int]:
    """The dense weight as bits, int16, read place by place; and how many zeros are stored that `columns` do not need."""
    dense, zeros = torch.zeros(rows, columns, dtype=torch.int16), 0
    order = packed[:rows].tolist()
    assert sorted(order) == list(range(rows))
    for segment in segments_of(packed, rows):
        masks, values = (segment.masks.long() & 0xFFFFFFFF).tolist(), segment.values.tolist()
        for lane in range(32):
            g, t, following = lane // 4, lane % 4, [0, 0]
            for step, mask in enumerate(masks):
                for p in range(16):
                    i, j, r = p // 8, p // 4 % 2, p % 4
                    for b in range(2):
                        if not mask[lane] >> (2 * p + b) & 1:
                            continue
                        value = values[following[b]][lane][b]
                        following[b] += 1
                        row = segment.tile * 32 + 16 * i + 8 * (r % 2) + g
                        column = (segment.first + step) * 32 + 8 * t + 4 * j + 2 * (r // 2) + b
                        zeros += value == 0
                        if row < rows and column < columns:
                            dense[order[row], column] = value
                        else:
                            assert value == 0
    return dense, zeros


def check_schedule(packed: Tensor, rows: int) -> None:
    """Goes through the steps as the ring does: 96 lines, groups of 8, copies of a step arrive three steps later."""
    for segment in segments_of(packed, rows):
        bits = segment.masks[:, :, None] >> torch.arange(32) & 1
        per_step = bits.view(len(bits), 32, 16, 2).sum(dim=2).flatten(1)  # of 64 streams
        read = torch.cat([torch.zeros(1, 64, dtype=torch.int64), per_step.cumsum(0)])
        arrives = [8 * sum(segment.before[: n + 1]) for n in range(3)]
        for step in range(len(bits)):
            started = arrives[-1] + 8 * segment.counts[step]
            assert int(read[step + 1].max()) <= arrives[step], (
                "a line is read before its copy is waited for"
            )
            assert started - 96 <= int(read[step].min()), (
                "a line is overwritten before all have read it"
            )
            arrives.append(started)
        assert arrives[-1] == len(segment.values)
        assert len(bits) < 4 or len(segment.values) - int(read[-1].max()) < 8


@pytest.fixture(params=AWKWARD)
def weight(request: pytest.FixtureRequest) -> StoredWeight:
    return AWKWARD[request.param](unstructured_weight)


def test_each_number_is_where_the_description_says(weight):
    packed = pack(weight, UNSTRUCTURED)
    dense, _ = unpack_slowly(packed, weight.rows, weight.columns)
    assert torch.equal(dense, weight.dense().view(torch.int16))


def test_copies_arrive_in_time_and_overwrite_nothing(weight):
    check_schedule(pack(weight, UNSTRUCTURED), weight.rows)


@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 17, 32])
def test_the_kernel_multiplies(weight, tokens):
    tiles = 2, 1 if tokens <= 8 else 2 if tokens == 16 else 4
    x, bias = (
        torch.randn(tokens, weight.columns).to(torch.bfloat16),
        torch.randn(weight.rows).to(torch.bfloat16),
    )
    out, error = product(
        UNSTRUCTURED,
        program(UNSTRUCTURED, *tiles),
        pack(weight, UNSTRUCTURED),
        x,
        weight.rows,
        bias,
    )
    assert error == ""
    assert_product(out, x, weight.dequantized(torch.float64), bias)


def test_the_kernel_expands(weight):
    packed, out = (
        pack(weight, UNSTRUCTURED),
        torch.full((weight.rows, weight.columns), torch.nan).to(torch.bfloat16),
    )
    sizes = (weight.rows, weight.columns, 0, units_of(UNSTRUCTURED, packed, weight.columns), 0)
    grid = expand_grid(UNSTRUCTURED, *out.shape)
    assert (
        emulate(UNSTRUCTURED, expand_program(UNSTRUCTURED), grid, packed, None, None, out, sizes)
        == ""
    )
    assert torch.equal(out, weight.dense())


def test_a_token_has_the_same_bits_in_every_program():
    weight = skewed(unstructured_weight, 40, 1024)
    packed, x = pack(weight, UNSTRUCTURED), torch.randn(8, 1024).to(torch.bfloat16)
    found = [
        product(UNSTRUCTURED, program(UNSTRUCTURED, *tiles), packed, x, 40)[0]
        for tiles in tiles_of(UNSTRUCTURED)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_zeros_are_stored_only_for_streams_that_would_stay_behind():
    for make, some in [
        (AWKWARD["leaning"], True),
        (AWKWARD["half"], False),
        (AWKWARD["full"], False),
    ]:
        made = make(unstructured_weight)
        _, zeros = unpack_slowly(pack(made, UNSTRUCTURED), made.rows, made.columns)
        assert bool(zeros) == some
    signs = from_dense(
        torch.tensor([[-0.0, 1.0, 0.0, 0.0, 0.0, -2.0, 0.0, 0.0]]).to(torch.bfloat16), "w"
    )
    dense, _ = unpack_slowly(pack(signs, UNSTRUCTURED), 1, 8)
    assert torch.equal(dense, signs.dense().view(torch.int16))  # -0.0 too


def test_rows_are_sorted_so_that_those_that_store_alike_are_padded_alike():
    weight = skewed(unstructured_weight, 512, 1024)
    packed = pack(weight, UNSTRUCTURED)
    stored = (weight.dense() != 0).sum(dim=1)[order_of(packed, 512)]
    assert bool((stored.diff() <= 0).all())
    padded = packed.numel() * 4 / (2 * weight.values.numel() + 512 * 1024 / 8)
    assert padded < 1.3  # bytes over those of values and masks alone


def test_rows_are_sorted_within_512_so_that_a_part_of_the_weight_is_a_part_of_the_packed_one():
    weight = unstructured_weight(552, 32, torch.rand(552, 1))
    packed = pack(weight, UNSTRUCTURED)
    order = order_of(packed, 552)
    assert order[:512].sort().values.tolist() == list(range(512))
    stored = (weight.dense() != 0).sum(dim=1)[order]
    assert bool((stored[:512].diff() <= 0).all())
    assert bool((stored[512:].diff() <= 0).all())
    assert int(stored[512]) > int(stored[511])


def test_segments_have_about_as_many_bytes_and_all_columns():
    weight = unstructured_weight(32, 4096, torch.linspace(1.0, 0.0, 4096))
    found = segments_of(pack(weight, UNSTRUCTURED), 32)
    sizes = [len(each.masks) + len(each.values) for each in found]
    assert [each.first for each in found] == [
        0,
        *torch.tensor([len(e.masks) for e in found]).cumsum(0).tolist()[:-1],
    ]
    assert sum(len(each.masks) for each in found) == 128
    assert max(sizes) < 1.25 * min(sizes)
    assert len(found[3].masks) > 2 * len(found[0].masks)


def test_a_very_wide_weight_has_no_segment_of_more_steps_than_a_warp_can_count():
    density = torch.zeros(65536)
    density[-128:] = 1.0
    packed = pack(unstructured_weight(1, 65536, density), UNSTRUCTURED)
    assert [len(each.masks) for each in segments_of(packed, 1)] == [512] * 4
    check_schedule(packed, 1)


def test_enough_bytes_are_under_way():
    """Copies of three steps are unfinished while a fourth is computed. An H100 needs some 20 KB per multiprocessor and has 227
    KB of shared memory; fewer warps than fit run where a layer has few rows, at least 4."""
    found = segments_of(pack(unstructured_weight(64, 4096), UNSTRUCTURED), 64)
    for each in found:
        per_step = 1024 * (sum(each.before) + sum(each.counts)) / len(each.counts) + 128 + 512
        warps = 4 * (227 * 1024 // (program(UNSTRUCTURED, 2, 1).shared_bytes + 1024))
        assert 3 * per_step * warps > 20_000
        assert 3 * per_step * 4 > 15_000


@pytest.mark.parametrize("density", [0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(256, 1536), (64, 8192)])
def test_the_expected_size_is_that_of_random_weights(rows, columns, density):
    size = 4 * pack(unstructured_weight(rows, columns, density), UNSTRUCTURED).numel()
    assert expected_bytes(rows, columns, density) == pytest.approx(size, rel=0.03)
    assert size >= least_bytes(rows, columns)


def test_many_rows_are_packed_in_parts(monkeypatch):
    from rac_gpu import unstructured

    weight = skewed(unstructured_weight, 200, 256)
    whole = pack(weight, UNSTRUCTURED)
    monkeypatch.setattr(unstructured, "_WEIGHTS_AT_ONCE", 1)
    assert torch.equal(pack(weight, UNSTRUCTURED), whole)


def test_other_floats_are_rounded():
    weight = from_dense(torch.randn(20, 64), "w")
    dense, _ = unpack_slowly(pack(weight, UNSTRUCTURED), 20, 64)
    assert torch.equal(dense.view(torch.bfloat16), weight.dense().to(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda w: {"values": w.values[:-1]},
            r"w: \d+ values in rows that start at other places .* damaged",
        ),
        (
            lambda w: {"starts": w.starts + 1},
            r"w: \d+ values in rows that start at other places .* damaged",
        ),
        (
            lambda w: {"starts": w.starts[:-1]},
            r"w: \d+ values in rows that start at other places .* damaged",
        ),
        (
            lambda w: {"bitmask": w.bitmask ^ 1},
            r"w: \d+ values in rows that start at other places .* damaged",
        ),
        (
            lambda w: {"values": w.values.to(torch.int8)},
            "w: values of torch.int8, which the layout does not hold",
        ),
        (
            lambda w: {"columns": 70000},
            "w: 70000 columns; the kernel has at most 65536; keep it dense",
        ),
    ],
)
def test_what_it_does_not_hold_or_is_damaged_is_refused(change, problem):
    weight = from_dense(unstructured_weight(20, 64).dense(), "w")
    with pytest.raises(RacError, match=problem):
        pack(replace(weight, **change(weight)), UNSTRUCTURED)
    with pytest.raises(RacError, match=r"layer: values of torch.int8"):
        pack(int4_weight(16, 64, 64), UNSTRUCTURED)
