"""How many instructions the GPU kernels have, counted in their machine code. No GPU was needed, and none was used."""

from __future__ import annotations

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.layout import Layout
from rac_modifier.kernels.cuda.programs import tiles_of

# Of one warp: (those of the loop over chunks, once through; all others). By row tiles and token tiles: (1, 1), (1, 2), (1, 4),
# (2, 1), (2, 2), (2, 4); only the last three for weights of any pattern, where the loop is over steps. NVRTC 13.5.
# `python -m tests.kernels.cuda.test_instruction_counts` prints this table, and the same file compares it with what the compiler
# makes of the sources.
COUNTS: dict[tuple[str, str], tuple[tuple[int, int], ...]] = {
    ("bf16", "sm_80"): ((77, 355), (66, 542), (83, 557), (97, 335), (75, 389), (103, 409)),
    ("bf16", "sm_89"): ((77, 355), (65, 543), (83, 557), (97, 335), (75, 389), (103, 409)),
    ("bf16", "sm_90"): ((82, 390), (80, 576), (98, 582), (103, 361), (83, 413), (111, 433)),
    ("bf16", "sm_100"): ((92, 364), (91, 397), (121, 415), (106, 374), (95, 433), (139, 461)),
    ("int4 g128", "sm_80"): ((202, 326), (144, 624), (191, 577), (327, 369), (228, 492), (293, 659)),
    ("int4 g128", "sm_89"): ((202, 326), (144, 624), (191, 577), (327, 369), (228, 492), (293, 659)),
    ("int4 g128", "sm_90"): ((206, 354), (158, 658), (196, 596), (329, 375), (234, 526), (299, 677)),
    ("int4 g128", "sm_100"): ((235, 365), (180, 516), (267, 709), (365, 435), (258, 582), (361, 775)),
    ("int4 g64", "sm_80"): ((214, 330), (156, 636), (221, 587), (344, 352), (241, 503), (329, 655)),
    ("int4 g64", "sm_89"): ((213, 331), (156, 636), (221, 587), (344, 352), (241, 503), (329, 655)),
    ("int4 g64", "sm_90"): ((216, 352), (171, 653), (229, 595), (349, 371), (249, 527), (337, 679)),
    ("int4 g64", "sm_100"): ((248, 368), (193, 519), (306, 710), (386, 430), (276, 572), (401, 775)),
    ("2:4 int8", "sm_80"): ((106, 374), (125, 651), (163, 581), (155, 397), (184, 400), (225, 623)),
    ("2:4 int8", "sm_89"): ((104, 368), (125, 651), (163, 581), (155, 397), (184, 400), (225, 623)),
    ("2:4 int8", "sm_90"): ((112, 400), (139, 685), (172, 620), (160, 424), (185, 423), (228, 636)),
    ("2:4 int8", "sm_100"): ((119, 369), (161, 535), (232, 736), (159, 449), (203, 477), (286, 794)),
    ("2:4 fp8", "sm_80"): ((135, 361), (156, 652), (194, 582), (218, 398), (247, 401), (289, 623)),
    ("2:4 fp8", "sm_89"): ((135, 361), (156, 652), (194, 582), (218, 398), (247, 401), (289, 623)),
    ("2:4 fp8", "sm_90"): ((143, 401), (172, 684), (202, 614), (222, 426), (246, 418), (291, 637)),
    ("2:4 fp8", "sm_100"): ((149, 371), (192, 536), (263, 737), (222, 442), (272, 480), (349, 787)),
    ("unstructured", "sm_80"): ((196, 348), (206, 378), (220, 428)),
    ("unstructured", "sm_89"): ((192, 352), (206, 378), (218, 430)),
    ("unstructured", "sm_90"): ((204, 372), (215, 401), (227, 453)),
    ("unstructured", "sm_100"): ((216, 408), (228, 460), (254, 530)),
    ("unstructured int8", "sm_80"): ((329, 335), (337, 359), (368, 424)),
    ("unstructured int8", "sm_89"): ((329, 335), (336, 352), (368, 424)),
    ("unstructured int8", "sm_90"): ((336, 352), (344, 384), (377, 455)),
    ("unstructured int8", "sm_100"): ((341, 363), (360, 416), (404, 476)),
    ("unstructured fp8", "sm_80"): ((392, 336), (399, 353), (431, 425)),
    ("unstructured fp8", "sm_89"): ((392, 336), (399, 353), (431, 425)),
    ("unstructured fp8", "sm_90"): ((397, 355), (406, 378), (441, 455)),
    ("unstructured fp8", "sm_100"): ((404, 364), (423, 417), (467, 477)),
    ("unstructured int4 g128", "sm_80"): ((397, 323), (419, 357), (471, 425)),
    ("unstructured int4 g128", "sm_89"): ((396, 324), (421, 355), (467, 421)),
    ("unstructured int4 g128", "sm_90"): ((401, 351), (421, 379), (472, 448)),
    ("unstructured int4 g128", "sm_100"): ((415, 369), (448, 432), (497, 495)),
    ("unstructured int4 g64", "sm_80"): ((393, 319), (415, 353), (468, 420)),
    ("unstructured int4 g64", "sm_89"): ((392, 320), (417, 359), (464, 424)),
    ("unstructured int4 g64", "sm_90"): ((396, 348), (417, 375), (467, 453)),
    ("unstructured int4 g64", "sm_100"): ((412, 372), (445, 435), (494, 498)),
}


def count_instructions(layout: Layout, architecture: str, row_tiles: int, token_tiles: int) -> tuple[int, int]:
    """Instructions of a decode kernel's loop over chunks, and all others, as one warp issues them.

    Raises:
        RacError: an architecture, such as "sm_75", that was not counted.
    """
    title = layout.any_pattern or layout.row_scales
    name = layout.title if title else "int4" if layout.group else "bf16"
    name += f" g{layout.group}" if layout.group else ""
    if (name, architecture) not in COUNTS:
        known = ", ".join(sorted({each for _, each in COUNTS}))
        raise RacError(f"there are no instruction counts for {architecture}; they exist for {known}")
    return COUNTS[name, architecture][tiles_of(layout).index((row_tiles, token_tiles))]
