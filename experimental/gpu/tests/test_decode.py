"""The kernels' own source, run in the emulator, against products in float64."""

from __future__ import annotations

import re

import pytest
import torch
from rac_gpu.check import random_weight
from rac_gpu.layout import pack, units
from rac_gpu.programs import (
    CHUNKS,
    EXPAND,
    Program,
    all_programs,
    decode_program,
    expand_grid,
)

from tests.conftest import assert_product
from tests.emulate import SOURCES, emulate, place, product, sites

# Tokens, rows, columns. Rows are no multiple of 16 or an odd number of tiles, columns none of 256; more tokens than a tile.
SHAPES = [(1, 33, 264), (8, 40, 520), (3, 37, 904), (16, 48, 256), (32, 16, 64), (66, 134, 904)]
LEAST_SHARED_BYTES = 99 << 10  # per block, of sm_86, sm_89 and sm_120


@pytest.mark.parametrize("tiles", CHUNKS, ids=str)
@pytest.mark.parametrize("group", [64, 128])
def test_a_kernel_multiplies(group, tiles):
    for tokens, rows, columns in SHAPES:
        weight = random_weight(rows, columns, group)
        x = torch.randn(tokens, weight.columns).bfloat16()
        bias = None if tokens == 16 else torch.randn(rows).bfloat16()
        out, error = product(Program(group, *tiles), pack(weight, group), x, rows, bias)
        assert error == ""
        assert_product(out, x, weight.dequantized(torch.float64), bias)


@pytest.mark.parametrize("group", [64, 128])
def test_a_kernel_expands_a_part_of_the_rows(group):
    rows, columns, first = 77, 3 * group, 1
    weight = random_weight(rows, columns, group)
    packed = pack(weight, group)
    out = torch.full((rows - 16 * first, columns), torch.nan, dtype=torch.bfloat16)
    buffers = [place(each) for each in (packed, None, None, out)]
    sizes = (rows, columns, 0, units(columns), first)
    assert emulate(group, EXPAND, expand_grid(*out.shape), 0, buffers, sizes) == ""
    assert torch.equal(out, weight.dequantized(torch.bfloat16)[16 * first :])


def test_the_order_of_a_tokens_sums_follows_from_the_token_tiles_alone():
    """So that one program for all numbers of tokens gives the same bits for a token alone and among others."""
    packed, x = pack(random_weight(40, 640, 64), 64), torch.randn(20, 640).bfloat16()
    found = []
    for row_tiles in (1, 2, 4):
        every, _ = product(Program(64, row_tiles, 4), packed, x, 40)
        alone, _ = product(Program(64, row_tiles, 4), packed, x[7:8], 40)
        assert torch.equal(every[7:8], alone)
        found.append(every)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("tiles", CHUNKS, ids=str)
def test_a_barrier_or_wait_that_is_left_out_is_a_race(tiles):
    """Each of them: one is needed where the ring is used again, another after a single chunk of each warp."""
    lines = (SOURCES / "decode.h").read_text().splitlines()
    waits = [n for n, line in enumerate(lines, 1) if re.search("SYNC_|CP_ASYNC_WAIT", line)]
    named, caught, program = {f"decode.h:{n}" for n in waits}, set(), Program(128, *tiles)
    assert len(named) == 4
    for columns in (256, 4096, 128):
        x, packed = torch.randn(9, columns).bfloat16(), pack(random_weight(32, columns, 128), 128)
        assert product(program, packed, x, 32)[1] == ""
        assert sites(128) == named
        for site in named - caught:
            _, error = product(program, packed, x, 32, skip=site)
            if error.startswith(("race", "read of shared memory that nobody wrote")):
                caught.add(site)
    assert caught == named


def test_a_program_needs_all_of_its_shared_memory_and_fits_on_every_card():
    weight, x = random_weight(32, 4096, 128), torch.randn(1, 4096).bfloat16()
    for each in all_programs(128):
        less = each.shared_bytes - 16
        _, error = product(each, pack(weight, 128), x, 32, shared_bytes=less)
        assert error.startswith("access outside of shared memory")
        assert each.shared_bytes <= LEAST_SHARED_BYTES


def test_damaged_metadata_and_buffers_are_noticed():
    packed, x = pack(random_weight(16, 256, 128), 128), torch.ones(1, 256, dtype=torch.bfloat16)
    program = Program(128, 1, 1)
    assert product(program, packed[:-16], x, 16)[1].startswith("access outside of global memory")
    shifted = torch.cat([x.flatten(), x.flatten()[:1]])[1:].view(1, 256)
    assert product(program, packed, shifted, 16)[1].startswith("misaligned access of 16 bytes")
    packed[512] = packed[512] & 0xF0 | 0b0001  # i0 = 1, i1 = 0
    assert product(program, packed, x, 16)[1].startswith("metadata that is not ordered")


def test_the_source_has_these_programs_and_no_others():
    found = re.findall(r"KERNEL\((rac_\w+)", (SOURCES / "decode.cu").read_text())
    assert sorted(found) == sorted([EXPAND, *(each.name for each in all_programs(128))])


@pytest.mark.parametrize(
    ("rows", "tokens", "tiles"),
    [
        (16 * 132, 1, (1, 1)),  # a tile per multiprocessor
        (28672, 1, (2, 1)),  # 7 blocks of 2 tiles, and 4 blocks of 4: 16
        (28672, 8, (4, 1)),  # x is read 4 times in place of 7
        (4096, 8, (2, 1)),  # 128 blocks; 64 would leave half of the multiprocessors idle
        (4096, 64, (4, 4)),  # twice as many, along the tokens
    ],
)
def test_rows_and_tokens_choose_the_tiles_per_block(rows, tokens, tiles):
    assert decode_program(128, rows, 4096, tokens, 132) == Program(128, *tiles)
    assert decode_program(128, rows, 4096, tokens, 132, same_order=True).token_tiles == 4
