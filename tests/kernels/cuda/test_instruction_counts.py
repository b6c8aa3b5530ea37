"""The counts that times are predicted from are those of the disassembly. `python -m tests.kernels.cuda.test_instruction_counts`
prints them as they stand in the module."""

from __future__ import annotations

import pytest

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.cards import CARDS
from rac_modifier.kernels.cuda.instruction_counts import COUNTS, count_instructions
from rac_modifier.kernels.cuda.layout import (
    BF16,
    E4M3,
    E4M3_GROUPS,
    INT4,
    INT4_FP32_SCALES,
    INT8,
    INT8_GROUPS,
    UNSTRUCTURED,
    UNSTRUCTURED_E4M3,
    UNSTRUCTURED_E4M3_GROUPS,
    UNSTRUCTURED_INT4,
    UNSTRUCTURED_INT8,
    UNSTRUCTURED_INT8_GROUPS,
    Layout,
)
from rac_modifier.kernels.cuda.programs import program, tiles_of
from tests.kernels.cuda.machine_code import kernels

ARCHITECTURES = {
    "sm_80": "sm_80",
    "sm_89": "sm_89",
    "sm_90": "sm_90a",
    "sm_100": "sm_100a",
}  # the same loops, and compiled for another test
LAYOUTS = {
    "bf16": BF16,
    "int4 g128": INT4[128],
    "int4 g64": INT4[64],
    "int4 fp32 g128": INT4_FP32_SCALES[128],
    "int4 fp32 g64": INT4_FP32_SCALES[64],
    "2:4 int8": INT8,
    "2:4 int8 g128": INT8_GROUPS[128],
    "2:4 int8 g64": INT8_GROUPS[64],
    "2:4 fp8": E4M3,
    "2:4 fp8 g128": E4M3_GROUPS[128],
    "2:4 fp8 g64": E4M3_GROUPS[64],
    "unstructured": UNSTRUCTURED,
    "unstructured int8": UNSTRUCTURED_INT8,
    "unstructured int8 g128": UNSTRUCTURED_INT8_GROUPS[128],
    "unstructured int8 g64": UNSTRUCTURED_INT8_GROUPS[64],
    "unstructured fp8": UNSTRUCTURED_E4M3,
    "unstructured fp8 g128": UNSTRUCTURED_E4M3_GROUPS[128],
    "unstructured fp8 g64": UNSTRUCTURED_E4M3_GROUPS[64],
    "unstructured int4 g128": UNSTRUCTURED_INT4[128],
    "unstructured int4 g64": UNSTRUCTURED_INT4[64],
}


def disassembled(layout: Layout, architecture: str) -> dict[tuple[int, int], tuple[int, int]]:
    """Instructions of the loop and all others, by row tiles and token tiles."""
    found = kernels(layout, ARCHITECTURES[architecture])
    each = {tiles: found[program(layout, *tiles).name] for tiles in tiles_of(layout)}
    return {tiles: (len(k.loop), len(k.instructions) - len(k.loop)) for tiles, k in each.items()}


# 8-bit values in groups, and scales in fp32, add the same few instructions everywhere: one architecture each.
CASES = [
    (layout, each)
    for n, layout in enumerate(LAYOUTS)
    for m, each in enumerate(ARCHITECTURES)
    if not (LAYOUTS[layout].group and (LAYOUTS[layout].bits == 8 or "fp32" in layout))
    or n % len(ARCHITECTURES) == m
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "architecture"), CASES)
def test_the_counts_are_those_of_the_machine_code(layout, architecture):
    """Within a tenth: another NVRTC orders and addresses a little differently."""
    for tiles, numbers in disassembled(LAYOUTS[layout], architecture).items():
        stored = count_instructions(LAYOUTS[layout], architecture, *tiles)
        assert stored == pytest.approx(numbers, rel=0.1), (
            tiles,
            "python -m tests.kernels.cuda.test_instruction_counts",
        )


def test_every_card_has_counts_of_every_layout():
    assert {card.architecture for card in CARDS} == set(ARCHITECTURES)
    assert set(COUNTS) == {(layout, each) for layout in LAYOUTS for each in ARCHITECTURES}
    for (layout, _), numbers in COUNTS.items():
        assert len(numbers) == (3 if layout.startswith("unstructured") else 11)


def test_a_count_is_found_by_layout_and_tiles():
    assert count_instructions(BF16, "sm_80", 2, 1) == COUNTS["bf16", "sm_80"][3]
    assert count_instructions(INT4[64], "sm_100", 1, 4) == COUNTS["int4 g64", "sm_100"][2]
    assert (
        count_instructions(INT4_FP32_SCALES[64], "sm_80", 2, 2)
        == COUNTS["int4 fp32 g64", "sm_80"][4]
    )
    assert count_instructions(UNSTRUCTURED, "sm_90", 2, 4) == COUNTS["unstructured", "sm_90"][2]
    assert (
        count_instructions(UNSTRUCTURED_INT8, "sm_90", 2, 4)
        == COUNTS["unstructured int8", "sm_90"][2]
    )
    assert (
        count_instructions(UNSTRUCTURED_INT4[64], "sm_90", 2, 1)
        == COUNTS["unstructured int4 g64", "sm_90"][0]
    )


def test_an_architecture_without_counts_is_an_error():
    with pytest.raises(RacError, match="no instruction counts for sm_75"):
        count_instructions(BF16, "sm_75", 2, 1)


if __name__ == "__main__":
    for name, layout in LAYOUTS.items():
        for each in ARCHITECTURES:
            counts = " ".join(
                f"{loop}+{others}" for loop, others in disassembled(layout, each).values()
            )
            print(f'    ("{name}", "{each}"): "{counts}",')
