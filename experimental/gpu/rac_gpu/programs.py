"""The compiled programs of the GPU kernels: their names, sizes and grids. Numbers only; rac_gpu/source/ has the code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from rac_gpu import schedule, unstructured
from rac_gpu.layout import TILE, Layout

# Tokens that the kernels of any pattern and of 2:4 multiply; more are multiplied by a dense product with the weight expanded in
# parts. Predicted from bytes and instructions; not measured.
MOST_TOKENS, MOST_TOKENS_24 = 128, 256
_TOKENS = 8  # of a token tile
PRODUCT_BLOCK = (128, 128)  # rows and tokens of a block of a dense product; assumed of cuBLAS
_WIDE = 8  # row tiles of rac_gpu/source/wide.h, whose warps share x
# (row tiles, token tiles): units per chunk, stages, warps. The same numbers as in the sources.
_BF16 = {
    (1, 1): (2, 4, 4),
    (2, 1): (2, 3, 4),
    (1, 2): (1, 4, 4),
    (2, 2): (1, 4, 4),
    (1, 4): (1, 3, 4),
    (2, 4): (1, 3, 4),
    (4, 1): (1, 4, 4),
    (4, 2): (1, 3, 4),
    (4, 4): (1, 4, 2),
    (8, 4): (1, 5, 4),
    (8, 8): (1, 5, 4),
}
_INT4 = {
    (1, 1): (2, 3, 4),
    (2, 1): (2, 3, 4),
    (1, 2): (1, 4, 4),
    (2, 2): (1, 4, 4),
    (1, 4): (1, 4, 2),
    (2, 4): (1, 4, 2),
    (4, 1): (1, 4, 4),
    (4, 2): (1, 3, 4),
    (4, 4): (1, 3, 2),
    (8, 4): (1, 5, 4),
    (8, 8): (1, 4, 4),
}
_BYTES = {
    (1, 1): (1, 4, 4),
    (2, 1): (1, 4, 4),
    (1, 2): (1, 4, 4),
    (2, 2): (1, 3, 4),
    (1, 4): (1, 4, 2),
    (2, 4): (1, 4, 2),
    (4, 1): (1, 3, 4),
    (4, 2): (1, 4, 2),
    (4, 4): (1, 3, 2),
    (8, 4): (1, 4, 4),
    (8, 8): (1, 3, 4),
}
_ANY_PATTERN = ((2, 1), (2, 2), (2, 4))  # tiles; rac_gpu/source/unstructured.h has the rest


@dataclass(frozen=True)
class Program:
    """A kernel. `row_tiles` of 16 rows and `token_tiles` of 8 tokens per block; `shared_bytes` per block.

    `units`: of columns, in a chunk that a warp takes at a time; 0 where a kernel has no chunks. `x_reads`: how often x is read
    from shared memory. `split`: warps that share the columns of a block; 1 where they share its rows.
    """

    name: str
    row_tiles: int
    token_tiles: int
    threads: int
    shared_bytes: int
    units: int = 0
    x_reads: int = 1
    split: int = 1

    def grid(self, rows: int, tokens: int) -> tuple[int, int]:
        """Blocks along tokens and along rows; neighbours have the same rows."""
        return -(-tokens // (_TOKENS * self.token_tiles)), -(-rows // (TILE * self.row_tiles))


def most_tokens(layout: Layout) -> int:
    """Tokens up to which a layout's kernels multiply; more are expanded."""
    return MOST_TOKENS if layout.any_pattern else MOST_TOKENS_24


@lru_cache(maxsize=4096)  # each launch outside of a graph asks
def decode_program(
    layout: Layout, rows: int, columns: int, tokens: int, processors: int, same_order: bool = False
) -> Program:
    """What multiplies `tokens` tokens on a GPU with this many multiprocessors.

    A block reads all of x, so more row tiles per block read it less often; fewer leave less for the busiest multiprocessor.
    Taken: those with which the busiest one is done first. Weights of any pattern are packed in two. `same_order`: a token's
    sums have one order, whatever the number of tokens.
    """
    if same_order:
        tokens = _TOKENS * 4
    token_tiles = next(((n,) for n in (1, 2, 4) if tokens <= _TOKENS * n), (4, 8))
    choices = [program(layout, *tiles) for tiles in tiles_of(layout) if tiles[1] in token_tiles]
    return min(choices, key=lambda each: _slowest(each, layout, rows, columns, tokens, processors))


def _slowest(
    program: Program, layout: Layout, rows: int, columns: int, tokens: int, processors: int
) -> float:
    """Work of the multiprocessor with most blocks: of the two that row tiles decide, the one that takes longer.

    That is what it takes from L2, at about 32 bytes per cycle, or what it writes to shared memory and reads there, at 128.
    """
    if layout.any_pattern:
        return 0  # there is one choice
    along_tokens, along_rows = program.grid(rows, tokens)
    weights = program.row_tiles * layout.units(columns) * layout.unit_bytes
    padded = _TOKENS * program.token_tiles
    x, padded_x = (2 * columns * number for number in (min(tokens, padded), padded))
    shared = weights + (1 + program.x_reads) * padded_x / 2
    return -(-along_rows * along_tokens // processors) * max(2 * (weights + x), shared)


def program(layout: Layout, row_tiles: int, token_tiles: int) -> Program:
    """The decode program with these tiles."""
    name = f"{layout.prefix}_r{row_tiles}_t{token_tiles}"
    if layout.streams is not None:
        shared_bytes = unstructured.shared_bytes(token_tiles, layout.streams)
        return Program(
            name,
            row_tiles,
            token_tiles,
            32 * schedule.SEGMENTS,
            shared_bytes,
            split=schedule.SEGMENTS,
        )
    units, stages, warps = _chunks(layout)[row_tiles, token_tiles]
    chunk = units * (
        row_tiles * layout.unit_bytes + token_tiles * _TOKENS * layout.unit_columns * 2
    )
    if row_tiles == _WIDE:
        return Program(
            name, row_tiles, token_tiles, 32 * warps, stages * chunk, units, x_reads=warps
        )
    return Program(
        name, row_tiles, token_tiles, 32 * warps, warps * stages * chunk, units, split=warps
    )


def expand_program(layout: Layout) -> Program:
    """What writes rows of the dense weight; a block has a tile and four units, or all of a tile of any pattern."""
    return Program(f"{layout.prefix}_expand", 1, 0, 128, 0)


def expand_grid(layout: Layout, rows: int, columns: int) -> tuple[int, int]:
    """Blocks along rows and along units."""
    if layout.any_pattern:
        return -(-rows // layout.tile_rows), 1
    return -(-rows // TILE), -(-layout.units(columns) // 4)


def product_waves(rows: int, tokens: int, processors: int) -> int:
    """How often the multiprocessors take a block each, in a dense product."""
    blocks = -(-rows // PRODUCT_BLOCK[0]) * -(-tokens // PRODUCT_BLOCK[1])
    return -(-blocks // processors)


@lru_cache(maxsize=4096)
def part_rows(
    layout: Layout,
    rows: int,
    columns: int,
    tokens: int,
    processors: int,
    cache: int,
    scratch_bytes: int,
) -> int:
    """Rows of a weight that are expanded at a time, into at most `scratch_bytes`; `cache`: bytes of L2, 0 where not known.

    A dense product's blocks run in waves. Taken: rows with which all parts together have fewest. Where that is possible in
    parts of half of L2, these are taken: what was just written is read from there. Not for any pattern, whose small parts
    would leave multiprocessors idle while they are expanded.
    """

    def waves(step: int) -> int:
        last = rows % step
        whole = rows // step * product_waves(step, tokens, processors)
        return whole + (product_waves(last, tokens, processors) if last else 0)

    def cut(limit: int) -> int:
        tile = layout.expanded_rows
        most, unit = max(tile, limit // (2 * columns) // tile * tile), max(tile, PRODUCT_BLOCK[0])
        fewest = -(-rows // most)
        steps = [
            min(most, -(-rows // (parts * unit)) * unit) for parts in range(fewest, 2 * fewest + 4)
        ]
        return min(steps, key=lambda step: (waves(step), -step))

    large = cut(scratch_bytes)
    small = cut(min(scratch_bytes, cache // 2)) if cache and not layout.any_pattern else large
    return small if waves(small) <= waves(large) else large


def all_programs(layout: Layout) -> list[Program]:
    """Every program of a layout."""
    return [*(program(layout, *tiles) for tiles in tiles_of(layout)), expand_program(layout)]


def tiles_of(layout: Layout) -> tuple[tuple[int, int], ...]:
    """Row tiles and token tiles of a layout's decode programs."""
    return _ANY_PATTERN if layout.any_pattern else tuple(sorted(_chunks(layout)))


def _chunks(layout: Layout) -> dict[tuple[int, int], tuple[int, int, int]]:
    return {4: _INT4, 8: _BYTES, 16: _BF16}[layout.bits]
