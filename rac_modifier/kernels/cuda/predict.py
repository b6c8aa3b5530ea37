"""How long a product takes on a GPU, predicted from bytes and instructions. Nothing was measured on a GPU.

    time = max over resources of (work / rate / REACHED) + LAUNCH

Memory: the bytes of the weight, once for all tokens, of x and of the result, over the bandwidth of the card. The other resources
belong to a multiprocessor, and the one with most blocks is counted: ceil(blocks / multiprocessors) blocks. Of a block of the
sparse kernels:

- L2: its weights, and x, which each block reads again;
- shared memory: weights and x, written once and read once, x by each warp where warps share the rows of a block;
- instructions: (chunks of columns) x (those of the loop, of each warp where warps share the rows) + (warps) x (all others), see
  `instruction_counts.py`;
- tensor cores: rows x columns / 2 x tokens multiply-adds, with tokens padded to 8, 16, 32 or 64.

Weights of any pattern have the bytes that are expected of their density. L2 gives a part of them twice (the ring's first
lines); a warp loads values and masks from shared memory 33 times per 1024 weights (bfloat16) or 34 times per 2048 (int8, fp8
and int4), and each load counts as 128 bytes; a loop is a step of 32 rows and 32 columns (bfloat16) or 64 (the others); and all
multiply-adds are done, at the rate of dense products.

Dense kernels are taken as bound by memory, or by the published rate of products, which favours them. Left out, also for them: the
last blocks of a kernel that leave multiprocessors idle (in the memory's share), latency, conflicts of banks. So this is
optimistic, most of all where a second resource is close to the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.cards import Card
from rac_modifier.kernels.cuda.instruction_counts import count_instructions
from rac_modifier.kernels.cuda.layout import TILE, Layout
from rac_modifier.kernels.cuda.operator import SCRATCH_BYTES
from rac_modifier.kernels.cuda.programs import (
    MOST_TOKENS,
    PRODUCT_BLOCK,
    Program,
    decode_program,
    part_rows,
    product_waves,
)
from rac_modifier.kernels.cuda.schedule import LINE

REACHED = 0.85  # share of each rate that a good kernel reaches; assumed
LAUNCH = 2.0  # microseconds per kernel within a CUDA graph, its start and its end; assumed
# Bytes per weight of what vLLM runs dense: cuBLAS; CUTLASS, one scale per row; Marlin or Machete, a 16-bit scale per 128 columns.
DENSE = {"bf16": 2.0, "fp8": 1.0, "int4": 0.5 + 2 / 128}
DECODE_TOKENS = (
    8  # of the step that layers are decided for; the kernels take as long for 1 token as for 8
)
# Share of twice the rate of dense products that cuSPARSELt is taken to reach with a 2:4 weight; assumed, see docs/results/gpu.md.
CUSPARSELT = 0.75
_COMPRESSED = 2 * 9 / 16  # bytes per weight of its copy in bfloat16
_ISSUED = 4  # instructions of warps per multiprocessor and cycle: four schedulers, one each
_SHARED = 128  # bytes of shared memory per multiprocessor and cycle: 32 banks of 4
_TOKENS = 8  # of a token tile
_FP8_PRODUCTS = (8, 9)  # capability from which on products of fp8 are twice as fast


@dataclass(frozen=True)
class Time:
    """Microseconds of one product: what each resource alone would take. `launch` is added to the longest."""

    memory: float
    cache: float = 0.0
    shared: float = 0.0
    instructions: float = 0.0
    tensor_cores: float = 0.0
    launch: float = LAUNCH

    @property
    def total(self) -> float:
        """Microseconds."""
        return self.launch + max(self._resources.values())

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self._resources, key=self._resources.__getitem__)

    @property
    def _resources(self) -> dict[str, float]:
        return {
            "memory": self.memory,
            "L2": self.cache,
            "shared memory": self.shared,
            "instructions": self.instructions,
            "tensor cores": self.tensor_cores,
        }


def check_tokens(tokens: int) -> int:
    """The number of tokens of a step.

    Raises:
        RacError: fewer than 1, or more than the formula is for.
    """
    if not 1 <= tokens <= MOST_TOKENS:
        raise RacError(
            f"{tokens} tokens: times are predicted for 1 to {MOST_TOKENS}; give a number of these"
        )
    return tokens


def dense_time(card: Card, rows: int, columns: int, tokens: int, bytes_per_weight: float) -> Time:
    """Of x [tokens, columns] times a dense weight [rows, columns], in bfloat16."""
    memory = _memory(card, rows * columns * bytes_per_weight, rows, columns, check_tokens(tokens))
    peak = card.peak * (
        2 if bytes_per_weight == DENSE["fp8"] and card.capability >= _FP8_PRODUCTS else 1
    )
    return Time(memory, tensor_cores=1e6 * 2 * rows * columns * tokens / peak / REACHED)


def sparse_time(
    card: Card, layout: Layout, rows: int, columns: int, tokens: int, density: float = 0.5
) -> Time:
    """Of x [tokens, columns] times a sparse weight [rows, columns], on the kernel that the operator would launch.

    `density`: share of the weight that is stored; only for a layout of any pattern, 2:4 takes the same for all.

    Raises:
        RacError: a number of tokens that the formula is not for.
    """
    program = decode_program(layout, rows, columns, check_tokens(tokens), card.processors)
    return time_of(card, layout, program, rows, columns, tokens, density)


def time_of(
    card: Card,
    layout: Layout,
    program: Program,
    rows: int,
    columns: int,
    tokens: int,
    density: float,
) -> Time:
    """The same on one of the layout's programs."""
    loop, others = count_instructions(
        layout, card.architecture, program.row_tiles, program.token_tiles
    )
    size = layout.nbytes(rows, columns, density)
    along_tokens, along_rows = program.grid(rows, tokens)
    blocks = along_tokens * along_rows
    padded_tokens, padded_columns = program.token_tiles * _TOKENS, layout.padded_columns(columns)
    if layout.streams is not None:
        loops, halved = padded_columns // layout.streams.step, 1
        whole_tile = layout.nbytes(
            layout.tile_rows, columns, density
        )  # the last one may have fewer rows
        copied = whole_tile * (1 + layout.streams.repeated / layout.streams.ring)
        read = loops * layout.streams.loads * LINE
    else:
        units = layout.units(columns)
        loops, halved = units // program.units, 2
        copied = read = program.row_tiles * units * layout.unit_bytes

    warps = program.threads // 32

    def busiest(work: float, per_cycle: float) -> float:
        cycles = -(-blocks // card.processors) * work / per_cycle
        return 1e6 * cycles / card.clock / REACHED

    return Time(
        memory=_memory(card, size, rows, columns, tokens),
        cache=busiest(copied + 2 * min(tokens, padded_tokens) * columns, card.cache_port),
        shared=busiest(
            copied + read + 2 * (1 + program.x_reads) * padded_tokens * padded_columns, _SHARED
        ),
        instructions=busiest(loops * loop * warps // program.split + warps * others, _ISSUED),
        tensor_cores=busiest(
            program.row_tiles * TILE * padded_columns / halved * padded_tokens, card.products
        ),
    )


def over_dense(
    card: Card, layout: Layout, rows: int, columns: int, density: float
) -> tuple[float, str]:
    """How many times as fast as dense bfloat16 a decode step of a layer is on its kernel, and that in words.

    Dense bfloat16 is what runs otherwise: the weight is expanded, since vLLM has no kernel for its packed form.
    """
    packed = sparse_time(card, layout, rows, columns, DECODE_TOKENS, density).total
    dense = dense_time(card, rows, columns, DECODE_TOKENS, DENSE["bf16"]).total
    took = f"{packed:.1f} us packed and {dense:.1f} us dense in bfloat16 for {DECODE_TOKENS} tokens, by bytes and instructions"
    return dense / packed, f"predicted on {card.title}: {took}"


def prompt_times(
    card: Card, layout: Layout, rows: int, columns: int, tokens: int, density: float
) -> tuple[float, float]:
    """Microseconds of a product with a prompt's tokens, more than the kernels take: packed, and dense in bfloat16.

    The weight is expanded in parts: packed bytes are read and those of bfloat16 written, at the rate of memory, or of L2 where
    half of it holds the part. The dense product of each part is bound by the published rate of such products, in whole waves
    of blocks, or by memory. A launch for each.
    """

    def product(rows: int) -> float:
        return max(
            _products(card, rows, columns, tokens),
            _memory(card, 2 * rows * columns, rows, columns, tokens),
        )

    step = part_rows(layout, rows, columns, tokens, card.processors, card.cache, SCRATCH_BYTES)
    in_cache = 2 * step * columns <= card.cache // 2 and not layout.any_pattern
    read = layout.nbytes(rows, columns, density) / card.bandwidth
    written = (
        2
        * rows
        * columns
        / (card.processors * card.cache_port * card.clock if in_cache else card.bandwidth)
    )
    expanding = 1e6 * (max(read, written) if in_cache else read + written) / REACHED
    parts = [min(step, rows - first) for first in range(0, rows, step)]
    return expanding + sum(product(part) + 2 * LAUNCH for part in parts), product(rows) + LAUNCH


def cusparselt_time(card: Card, rows: int, columns: int, tokens: int) -> float:
    """Microseconds of a product of a 2:4 weight with a prompt's tokens on cuSPARSELt.

    At `CUSPARSELT` times twice the rate of a dense product in the same waves of blocks, or bound by memory. A launch.
    """
    products = _products(card, rows, columns, tokens) / (2 * CUSPARSELT)
    return (
        max(products, _memory(card, _COMPRESSED * rows * columns, rows, columns, tokens)) + LAUNCH
    )


def _products(card: Card, rows: int, columns: int, tokens: int) -> float:
    """Microseconds that the tensor cores take for a dense product, in whole waves of blocks."""
    waves = product_waves(rows, tokens, card.processors)
    products = waves * card.processors * PRODUCT_BLOCK[0] * PRODUCT_BLOCK[1] * columns
    return 1e6 * 2 * products / card.peak / REACHED


def _memory(card: Card, size: float, rows: int, columns: int, tokens: int) -> float:
    moved = size + 2 * tokens * (rows + columns)
    return 1e6 * moved / card.bandwidth / REACHED
