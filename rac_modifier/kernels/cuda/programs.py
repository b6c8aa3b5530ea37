"""The compiled programs of the GPU kernels: their names, sizes and grids. Numbers only; csrc/gpu/ has the code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from rac_modifier.kernels.cuda import schedule, unstructured
from rac_modifier.kernels.cuda.layout import TILE, Layout

# More tokens than this are multiplied by a dense product with the weight expanded in parts. By bytes: the kernel reads a bf16
# weight of 1.13 bytes once per 32 tokens, expanding moves 5.1 bytes once. Assumed, not measured.
MOST_TOKENS = 128
_TOKENS = 8  # of a token tile
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
}
_ANY_PATTERN = ((2, 1), (2, 2), (2, 4))  # tiles; csrc/gpu/unstructured.h has the rest


@dataclass(frozen=True)
class Program:
    """A kernel. `row_tiles` of 16 rows and `token_tiles` of 8 tokens per block; `shared_bytes` per block.

    `units`: of columns, in a chunk that a warp takes at a time; 0 where a kernel has no chunks.
    """

    name: str
    row_tiles: int
    token_tiles: int
    threads: int
    shared_bytes: int
    units: int = 0

    def grid(self, rows: int, tokens: int) -> tuple[int, int]:
        """Blocks along rows and along tokens."""
        return -(-rows // (TILE * self.row_tiles)), -(-tokens // (_TOKENS * self.token_tiles))


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
    token_tiles = next((n for n in (1, 2) if tokens <= _TOKENS * n), 4)
    choices = [program(layout, *tiles) for tiles in tiles_of(layout) if tiles[1] == token_tiles]
    return min(choices, key=lambda each: _slowest(each, layout, rows, columns, tokens, processors))


def _slowest(program: Program, layout: Layout, rows: int, columns: int, tokens: int, processors: int) -> int:
    """Work of the multiprocessor with most blocks: of the two that row tiles decide, the one that takes longer.

    That is what it takes from L2, at about 32 bytes per cycle, or what it writes to shared memory and reads there, at 128.
    """
    if layout.any_pattern:
        return 0  # there is one choice
    along_rows, along_tokens = program.grid(rows, tokens)
    weights = program.row_tiles * layout.units(columns) * layout.unit_bytes
    padded = _TOKENS * program.token_tiles
    x, padded_x = (2 * columns * number for number in (min(tokens, padded), padded))
    return -(-along_rows * along_tokens // processors) * max(2 * (weights + x), weights + padded_x)


def program(layout: Layout, row_tiles: int, token_tiles: int) -> Program:
    """The decode program with these tiles."""
    name = f"{layout.prefix}_r{row_tiles}_t{token_tiles}"
    if layout.streams is not None:
        shared_bytes = unstructured.shared_bytes(token_tiles, layout.streams)
        return Program(name, row_tiles, token_tiles, 32 * schedule.SEGMENTS, shared_bytes)
    units, stages, warps = _chunks(layout)[row_tiles, token_tiles]
    chunk = units * (row_tiles * layout.unit_bytes + token_tiles * _TOKENS * layout.unit_columns * 2)
    return Program(name, row_tiles, token_tiles, 32 * warps, warps * stages * chunk, units)


def expand_program(layout: Layout) -> Program:
    """What writes rows of the dense weight; a block has a tile and four units, or all of a tile of any pattern."""
    return Program(f"{layout.prefix}_expand", 1, 0, 128, 0)


def expand_grid(layout: Layout, rows: int, columns: int) -> tuple[int, int]:
    """Blocks along rows and along units."""
    if layout.any_pattern:
        return -(-rows // layout.tile_rows), 1
    return -(-rows // TILE), -(-layout.units(columns) // 4)


def all_programs(layout: Layout) -> list[Program]:
    """Every program of a layout."""
    return [*(program(layout, *tiles) for tiles in tiles_of(layout)), expand_program(layout)]


def tiles_of(layout: Layout) -> tuple[tuple[int, int], ...]:
    """Row tiles and token tiles of a layout's decode programs."""
    return _ANY_PATTERN if layout.any_pattern else tuple(sorted(_chunks(layout)))


def _chunks(layout: Layout) -> dict[tuple[int, int], tuple[int, int, int]]:
    return _INT4 if layout.group else _BYTES if layout.row_scales else _BF16
