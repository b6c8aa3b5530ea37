"""How many instructions the GPU kernels have, counted in their machine code. No GPU was needed, and none was used."""

from __future__ import annotations

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.layout import Layout
from rac_modifier.kernels.cuda.programs import tiles_of

# Of one warp: those of the loop over chunks, once through, plus all others. By row tiles and token tiles: (1, 1), (1, 2), (1, 4),
# (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4); for weights of any pattern, where the loop is over steps, those of two row
# tiles only. NVRTC 13.5.
# `python -m tests.kernels.cuda.test_instruction_counts` prints this table, and the same file compares it with what the compiler
# makes of the sources.
_COUNTED = {
    ("bf16", "sm_80"): "77+355 66+542 83+557 96+352 82+398 103+425 82+398 102+410 148+860",
    ("bf16", "sm_89"): "77+363 65+543 83+557 96+352 82+398 103+425 82+398 102+410 148+860",
    ("bf16", "sm_90"): "82+390 80+584 98+582 106+374 91+429 112+448 93+435 110+442 150+914",
    ("bf16", "sm_100"): "92+364 91+405 121+423 106+382 95+449 139+477 94+426 116+444 172+932",
    ("int4 g128", "sm_80"): "202+326 144+632 191+577 331+397 228+508 293+667 313+527 384+520 477+955",
    ("int4 g128", "sm_89"): "202+326 144+632 191+577 331+397 229+507 293+667 313+527 384+520 477+947",
    ("int4 g128", "sm_90"): "206+354 157+659 196+596 337+423 234+534 299+693 318+554 378+542 472+1008",
    ("int4 g128", "sm_100"): "233+367 182+522 264+696 369+455 256+592 360+792 352+536 398+578 545+1023",
    ("int4 g64", "sm_80"): "214+330 156+636 221+587 351+385 240+520 327+673 334+522 408+528 548+948",
    ("int4 g64", "sm_89"): "213+331 156+636 221+587 352+384 240+520 327+673 336+528 408+528 548+948",
    ("int4 g64", "sm_90"): "216+352 169+655 229+595 357+419 249+543 335+689 349+563 420+564 554+1006",
    ("int4 g64", "sm_100"): "246+370 187+517 305+711 390+458 276+596 399+785 380+524 437+579 627+1029",
    ("2:4 int8", "sm_80"): "106+374 125+659 163+589 156+404 184+416 224+632 240+424 277+555 368+896",
    ("2:4 int8", "sm_89"): "104+368 125+659 163+589 156+404 184+416 224+632 240+424 277+555 368+896",
    ("2:4 int8", "sm_90"): "112+400 137+679 172+620 163+445 189+435 231+657 250+454 282+606 358+938",
    ("2:4 int8", "sm_100"): "119+369 161+535 232+736 159+449 203+485 286+802 283+429 343+617 405+1003",
    ("2:4 fp8", "sm_80"): "135+369 156+652 200+584 219+405 247+409 291+637 368+424 404+556 495+897",
    ("2:4 fp8", "sm_89"): "135+369 156+652 200+584 219+405 247+409 291+637 368+424 404+556 495+897",
    ("2:4 fp8", "sm_90"): "143+401 168+680 202+614 226+446 252+436 294+650 376+448 407+601 483+933",
    ("2:4 fp8", "sm_100"): "149+371 192+536 263+737 222+450 272+488 349+795 407+425 470+618 534+1002",
    ("unstructured", "sm_80"): "196+348 206+370 221+427",
    ("unstructured", "sm_89"): "192+344 206+370 219+429",
    ("unstructured", "sm_90"): "204+364 215+393 227+453",
    ("unstructured", "sm_100"): "216+408 228+452 254+530",
    ("unstructured int8", "sm_80"): "329+335 337+359 368+424",
    ("unstructured int8", "sm_89"): "329+335 336+352 368+424",
    ("unstructured int8", "sm_90"): "336+352 344+384 377+455",
    ("unstructured int8", "sm_100"): "341+363 360+416 404+476",
    ("unstructured fp8", "sm_80"): "392+336 399+353 431+425",
    ("unstructured fp8", "sm_89"): "392+336 399+353 431+425",
    ("unstructured fp8", "sm_90"): "397+355 406+378 441+455",
    ("unstructured fp8", "sm_100"): "404+364 423+417 467+477",
    ("unstructured int4 g128", "sm_80"): "397+323 419+357 471+425",
    ("unstructured int4 g128", "sm_89"): "396+324 421+355 467+421",
    ("unstructured int4 g128", "sm_90"): "401+351 421+379 472+448",
    ("unstructured int4 g128", "sm_100"): "415+369 448+432 497+495",
    ("unstructured int4 g64", "sm_80"): "393+319 415+353 468+420",
    ("unstructured int4 g64", "sm_89"): "392+320 417+359 464+424",
    ("unstructured int4 g64", "sm_90"): "396+348 417+375 467+453",
    ("unstructured int4 g64", "sm_100"): "412+372 445+435 494+498",
}
COUNTS: dict[tuple[str, str], tuple[tuple[int, ...], ...]] = {
    name: tuple(tuple(map(int, each.split("+"))) for each in counts.split()) for name, counts in _COUNTED.items()
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
    loop, others = COUNTS[name, architecture][tiles_of(layout).index((row_tiles, token_tiles))]
    return loop, others
