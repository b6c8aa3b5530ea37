"""Sizes and grids of the programs, and which one is taken."""

from __future__ import annotations

import re

import pytest
from rac_gpu.layout import (
    ALL,
    BF16,
    INT4,
    INT8,
    UNSTRUCTURED,
    UNSTRUCTURED_INT4,
    UNSTRUCTURED_INT8,
)
from rac_gpu.programs import (
    all_programs,
    decode_program,
    expand_grid,
    expand_program,
    program,
    tiles_of,
)

from tests.emulate import SOURCES

LEAST_SHARED_BYTES = 99 << 10  # per block, of sm_86, sm_89 and sm_120


def test_the_sources_have_these_programs_and_no_others():
    for layout in (BF16, INT8, INT4[64], UNSTRUCTURED, UNSTRUCTURED_INT8, UNSTRUCTURED_INT4[64]):
        text = (SOURCES / layout.source).read_text()
        found = re.findall(r"KERNEL\((rac_\w+)", text)
        assert sorted(found) == sorted(each.name for each in all_programs(layout))


def test_every_program_fits_on_every_card():
    for layout in ALL:
        for each in all_programs(layout):
            assert each.shared_bytes <= LEAST_SHARED_BYTES
            assert each.threads in (64, 128)


def test_tokens_choose_the_program():
    for tokens, tiles in [(1, 1), (8, 1), (9, 2), (16, 2), (17, 4), (32, 4), (33, 4), (64, 4)]:
        assert decode_program(BF16, 4096, 4096, tokens, 132).token_tiles == tiles
        assert decode_program(BF16, 4096, 4096, tokens, 132, same_order=True).token_tiles == 4


@pytest.mark.parametrize(
    ("layout", "rows", "columns", "tokens", "row_tiles"),
    [
        (BF16, 16 * 132, 4096, 1, 1),  # a tile per multiprocessor
        (BF16, 16 * 132 + 1, 4096, 1, 2),  # one of them would have two blocks
        (INT4[128], 28672, 4096, 1, 2),  # 7 blocks of 2 tiles, and 4 blocks of 4: 16
        (INT4[128], 28672, 4096, 8, 4),  # x is read 4 times in place of 7
        (
            INT4[128],
            4096,
            4096,
            8,
            2,
        ),  # 128 blocks; 64 would leave half of the multiprocessors idle
        (INT4[128], 4096, 4096, 64, 4),  # twice as many, along the tokens
        (INT4[128], 28672, 4096, 32, 8),  # x is read once per 128 rows
        (INT4[128], 28672, 4096, 128, 8),
        (BF16, 28672, 4096, 64, 8),
        (
            INT8,
            4096,
            4096,
            32,
            2,
        ),  # 32 blocks of 128 rows would leave three of four multiprocessors idle
        (UNSTRUCTURED, 28672, 4096, 128, 2),
        (UNSTRUCTURED, 16, 4096, 1, 2),  # it is packed so
    ],
)
def test_rows_and_tokens_choose_the_tiles_per_block(layout, rows, columns, tokens, row_tiles):
    assert decode_program(layout, rows, columns, tokens, 132).row_tiles == row_tiles


def test_a_batch_invariant_program_does_not_depend_on_the_tokens():
    for layout in (BF16, INT4[64]):
        for rows in (16, 2112, 4096, 28672):
            found = {
                decode_program(layout, rows, 4096, tokens, 132, same_order=True)
                for tokens in (1, 8, 33, 128, 500)
            }
            assert len(found) == 1


def test_tiles_of_a_layout():
    assert tiles_of(UNSTRUCTURED) == ((2, 1), (2, 2), (2, 4))
    shared_columns = [(rows, tokens) for rows in (1, 2, 4) for tokens in (1, 2, 4)]
    assert (
        tiles_of(BF16) == tiles_of(INT8) == tiles_of(INT4[64]) == (*shared_columns, (8, 4), (8, 8))
    )


def test_warps_share_the_columns_of_a_block_or_its_rows():
    for layout in (BF16, INT8, INT4[64]):
        wide, narrow = program(layout, 8, 8), program(layout, 4, 4)
        assert (wide.split, wide.x_reads, wide.threads) == (1, 4, 128)  # each warp reads all of x
        assert (narrow.split, narrow.x_reads) == (narrow.threads // 32, 1)
    assert program(UNSTRUCTURED, 2, 4).split == 4


def test_grids_cover_rows_tokens_and_units():
    assert program(BF16, 2, 1).grid(33, 8) == (1, 2)
    assert program(BF16, 1, 4).grid(33, 33) == (2, 3)
    assert program(BF16, 8, 8).grid(129, 65) == (2, 2)
    assert expand_grid(BF16, 33, 200) == (3, 1)
    assert expand_grid(BF16, 16, 264) == (1, 2)
    assert expand_grid(INT4[64], 16, 1040) == (1, 3)
    assert expand_grid(UNSTRUCTURED, 33, 4096) == (2, 1)
    assert program(UNSTRUCTURED, 2, 4).grid(33, 65) == (3, 2)
    assert expand_program(INT4[64]).shared_bytes == 0
