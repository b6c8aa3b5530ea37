"""Sizes and grids of the programs."""

from __future__ import annotations

import re

from rac_modifier.kernels.cuda.layout import ALL, BF16, INT4, INT8, UNSTRUCTURED, UNSTRUCTURED_INT4, UNSTRUCTURED_INT8
from rac_modifier.kernels.cuda.programs import (
    all_programs,
    decode_program,
    expand_grid,
    expand_program,
    program,
    tiles_of,
)
from tests.kernels.cuda.emulate import SOURCES

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
    for tokens, tiles in [(1, 1), (8, 1), (9, 2), (16, 2), (17, 4), (32, 4), (33, 4), (128, 4)]:
        assert decode_program(BF16, 4096, tokens, 132).token_tiles == tiles
        assert decode_program(BF16, 4096, tokens, 132, same_order=True).token_tiles == 4


def test_rows_choose_one_or_two_tiles_per_block():
    assert decode_program(BF16, 16 * 132, 1, 132).row_tiles == 1
    assert decode_program(BF16, 16 * 132 + 1, 1, 132).row_tiles == 2
    assert decode_program(UNSTRUCTURED, 16, 1, 132).row_tiles == 2  # it is packed so
    assert tiles_of(UNSTRUCTURED) == ((2, 1), (2, 2), (2, 4))
    assert tiles_of(BF16) == ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4))


def test_grids_cover_rows_tokens_and_units():
    assert program(BF16, 2, 1).grid(33, 8) == (2, 1)
    assert program(BF16, 1, 4).grid(33, 33) == (3, 2)
    assert expand_grid(BF16, 33, 200) == (3, 1)
    assert expand_grid(BF16, 16, 264) == (1, 2)
    assert expand_grid(INT4[64], 16, 1040) == (1, 3)
    assert expand_grid(UNSTRUCTURED, 33, 4096) == (2, 1)
    assert program(UNSTRUCTURED, 2, 4).grid(33, 33) == (2, 2)
    assert expand_program(INT4[64]).shared_bytes == 0
