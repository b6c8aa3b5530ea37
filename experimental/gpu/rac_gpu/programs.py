"""The compiled programs of the kernel: their names, sizes and grids. Numbers only; rac_gpu/source/ has the code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from rac_gpu.layout import TILE, UNIT, unit_bytes, units

# More tokens are multiplied by a dense product with the weight expanded in parts. Not measured.
MOST_TOKENS = 64
TOKENS = 8  # of a token tile
EXPAND = "rac_24_int4_expand"
# (row tiles, token tiles): units per chunk, stages, warps. The same numbers as in the source.
CHUNKS = {
    (1, 1): (2, 3, 4),
    (1, 2): (1, 4, 4),
    (1, 4): (1, 4, 2),
    (2, 1): (2, 3, 4),
    (2, 2): (1, 4, 4),
    (2, 4): (1, 4, 2),
    (4, 1): (1, 4, 4),
    (4, 2): (1, 3, 4),
    (4, 4): (1, 3, 2),
}


@dataclass(frozen=True)
class Program:
    """A kernel for groups of `group`: a block has `row_tiles` of 16 rows and `token_tiles` of 8 tokens."""

    group: int
    row_tiles: int
    token_tiles: int

    @property
    def name(self) -> str:
        """Return the kernel's name in the source."""
        return f"rac_24_int4_r{self.row_tiles}_t{self.token_tiles}"

    @property
    def units(self) -> int:
        """Return the units of columns in a chunk that a warp takes at a time."""
        return CHUNKS[self.row_tiles, self.token_tiles][0]

    @property
    def threads(self) -> int:
        """Return the threads of a block."""
        return 32 * CHUNKS[self.row_tiles, self.token_tiles][2]

    @property
    def chunk_bytes(self) -> int:
        """Return the bytes of a chunk: weights, and x of its tokens."""
        x = self.token_tiles * TOKENS * UNIT * 2
        return self.units * (self.row_tiles * unit_bytes(self.group) + x)

    @property
    def shared_bytes(self) -> int:
        """Return the shared memory of a block: a ring of chunks for each warp."""
        _, stages, warps = CHUNKS[self.row_tiles, self.token_tiles]
        return warps * stages * self.chunk_bytes

    def grid(self, rows: int, tokens: int) -> tuple[int, int]:
        """Return the blocks along tokens and along rows; neighbours have the same rows."""
        return -(-tokens // (TOKENS * self.token_tiles)), -(-rows // (TILE * self.row_tiles))


def all_programs(group: int) -> list[Program]:
    """Return every program that multiplies."""
    return [Program(group, *tiles) for tiles in CHUNKS]


@lru_cache(maxsize=4096)  # each launch outside of a graph asks
def decode_program(
    group: int, rows: int, columns: int, tokens: int, processors: int, same_order: bool = False
) -> Program:
    """Choose what multiplies `tokens` tokens on a GPU with this many multiprocessors.

    A block reads all of x, so more row tiles per block read it less often; fewer leave less for the busiest
    multiprocessor. Taken: those with which the busiest one reads the fewest bytes from L2. `same_order`: a token's sums
    have one order, whatever the number of tokens.
    """
    tokens = max(tokens, 4 * TOKENS) if same_order else tokens
    token_tiles = next((n for n in (1, 2, 4) if tokens <= TOKENS * n), 4)

    def slowest(each: Program) -> int:
        along_tokens, along_rows = each.grid(rows, tokens)
        weights = each.row_tiles * units(columns) * unit_bytes(group)
        x = 2 * columns * min(tokens, TOKENS * token_tiles)
        return -(-along_rows * along_tokens // processors) * (weights + x)

    return min(
        (each for each in all_programs(group) if each.token_tiles == token_tiles), key=slowest
    )


def expand_grid(rows: int, columns: int) -> tuple[int, int]:
    """Return the blocks along rows and along units; one has a tile and four units."""
    return -(-rows // TILE), -(-units(columns) // 4)
