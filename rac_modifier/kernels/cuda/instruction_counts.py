"""How many instructions the GPU kernels have, counted in their machine code. No GPU was needed, and none was used."""

from __future__ import annotations

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.layout import Layout

# Of one warp: (those of the loop over chunks, once through; all others). By row tiles and token tiles: (1, 1), (1, 2), (1, 4),
# (2, 1), (2, 2), (2, 4). NVRTC 13.5. `python -m tests.kernels.cuda.test_instruction_counts` prints this table, and the same
# file compares it with what the compiler makes of the sources.
COUNTS: dict[tuple[str, str], tuple[tuple[int, int], ...]] = {
    ("bf16", "sm_80"): ((78, 346), (66, 550), (83, 565), (97, 335), (75, 381), (103, 409)),
    ("bf16", "sm_89"): ((78, 346), (65, 551), (83, 565), (101, 339), (75, 381), (103, 409)),
    ("bf16", "sm_90"): ((79, 377), (80, 592), (98, 598), (106, 358), (83, 413), (111, 433)),
    ("bf16", "sm_100"): ((92, 364), (91, 397), (121, 423), (106, 382), (95, 441), (139, 461)),
    ("int4 g128", "sm_80"): ((202, 326), (144, 632), (191, 577), (327, 369), (228, 492), (293, 659)),
    ("int4 g128", "sm_89"): ((202, 326), (144, 632), (191, 577), (327, 369), (228, 492), (293, 659)),
    ("int4 g128", "sm_90"): ((206, 354), (161, 671), (196, 596), (329, 375), (234, 526), (299, 677)),
    ("int4 g128", "sm_100"): ((235, 365), (180, 516), (267, 709), (364, 436), (258, 582), (361, 775)),
    ("int4 g64", "sm_80"): ((215, 329), (156, 636), (221, 587), (344, 352), (241, 503), (329, 655)),
    ("int4 g64", "sm_89"): ((213, 331), (156, 636), (221, 587), (347, 357), (241, 503), (329, 655)),
    ("int4 g64", "sm_90"): ((216, 352), (174, 674), (229, 595), (349, 371), (249, 527), (337, 687)),
    ("int4 g64", "sm_100"): ((247, 369), (193, 527), (306, 710), (388, 436), (276, 580), (401, 775)),
}


def count_instructions(layout: Layout, architecture: str, row_tiles: int, token_tiles: int) -> tuple[int, int]:
    """Instructions of a decode kernel's loop over chunks, and all others, as one warp issues them.

    Raises:
        RacError: an architecture, such as "sm_75", that was not counted.
    """
    name = f"int4 g{layout.group}" if layout.group else "bf16"
    if (name, architecture) not in COUNTS:
        known = ", ".join(sorted({each for _, each in COUNTS}))
        raise RacError(f"there are no instruction counts for {architecture}; they exist for {known}")
    return COUNTS[name, architecture][3 * (row_tiles - 1) + token_tiles // 2]
