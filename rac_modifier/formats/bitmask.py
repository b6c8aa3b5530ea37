"""The bitmask layout of a sparse matrix: from a dense weight [N, K] to arrays and back.

The mask is uint8 [N, ceil(K/8)]: bit i of byte j is column 8j+i. Stored values are in row-major
order. Only +0.0 is left out: -0.0 is a value, so that unpacking returns the same bits. Weights
are handled as integers, so that NaN payloads stay, and block by block, to need little memory.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from rac_modifier.errors import RacError

DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Weights per block; a weight takes a byte in it, and for a moment an int64.
_BLOCK = 1 << 20
MOST_COLUMNS = 1 << 22  # of a matrix in a file: a block has a row at least


def damaged(name: str, fault: str) -> RacError:
    """Return the error that the tensor `name` cannot be what was written."""
    return RacError(f"{name}: {fault}; the checkpoint is damaged, copy it again")


def contradicts(name: str, fault: str) -> RacError:
    """Return the error that the tensor `name` does not fit config.json."""
    step = "restore the config.json that was saved with these files, or copy the checkpoint again"
    return RacError(f"{name}: {fault}; {step}")


def part_of(tensors: Mapping[str, Tensor], module: str, part: str) -> Tensor:
    """Return the tensor `part` of a module (RacError: it is missing)."""
    if part not in tensors:
        raise RacError(f"{module}.{part}: missing from the checkpoint; copy or save it again")
    return tensors[part]


def compress(weight: Tensor, count: int, keep: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the `count` values of a weight [N, K] that `keep` masks, 1-D, and the bitmask."""
    rows, columns = weight.shape
    values = torch.empty(count, dtype=weight.dtype, device=weight.device)
    bitmask = torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device=weight.device)
    start = 0
    for chunk in row_chunks(rows, columns):
        mask = keep(weight[chunk])
        chosen = as_integers(weight[chunk])[mask]
        as_integers(values)[start : start + len(chosen)] = chosen
        bitmask[chunk] = _to_bits(mask)
        start += len(chosen)
    return values, bitmask


def expand(values: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """Return the dense weight [N, columns] of stored values, 1-D."""
    dense = torch.zeros(len(bitmask), columns, dtype=values.dtype, device=values.device)
    for rows, block in dense_blocks(values, bitmask, columns):
        dense[rows] = block
    return dense


def dense_blocks(values: Tensor, bitmask: Tensor, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the dense weight block by block: its rows, and their values."""
    start = 0
    for rows in row_chunks(len(bitmask), columns):
        mask = _from_bits(bitmask[rows], columns)
        block = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
        count = int(mask.sum())
        as_integers(block).masked_scatter_(mask, as_integers(values)[start : start + count])
        yield rows, block
        start += count


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows that cover a matrix, each of about `_BLOCK` weights."""
    step = max(1, _BLOCK // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def nonzero(weight: Tensor) -> Tensor:
    """Return a bool mask of the values other than 0.0 and -0.0, also of 8-bit floats."""
    integers = as_integers(weight)
    # The shift removes the sign bit, so that -0.0 becomes 0 and nothing else does.
    return (integers << 1 if weight.is_floating_point() else integers) != 0


def as_integers(tensor: Tensor) -> Tensor:
    """View a tensor as integers of the same width."""
    return tensor.view(_INTEGER[tensor.element_size()])


def row_counts(bitmask: Tensor) -> Tensor:
    """Count the set bits of each row, int64 [N]."""
    counts = (_half_byte_counts(rows, per_byte=True) for rows in _blocks(bitmask))
    return torch.cat([rows.sum(dim=1, dtype=torch.int64) for rows in counts])


def most_of_four(bitmask: Tensor) -> int:
    """Return the most set bits of four neighbouring columns."""
    counts = (_half_byte_counts(rows) for rows in _blocks(bitmask))
    return max(max(int((rows & 0x0F).max()), int((rows >> 4).max())) for rows in counts)


def _blocks(bitmask: Tensor) -> tuple[Tensor, ...]:
    """Cut a mask into rows of about `_BLOCK` bytes: a sum in int64 takes eight times the memory."""
    blocks: tuple[Tensor, ...] = bitmask.split(max(1, _BLOCK // max(1, bitmask.shape[1])))
    return blocks


def sums_of_four(counts: Tensor) -> Tensor:
    """Sum each four consecutive columns; torch.sum is several times slower."""
    pairs = counts[:, ::2] + counts[:, 1::2]
    return pairs[:, ::2] + pairs[:, 1::2]


def _half_byte_counts(bitmask: Tensor, per_byte: bool = False) -> Tensor:
    """Count the set bits of each half byte, in that half; with `per_byte`, of each byte."""
    pairs = bitmask - ((bitmask >> 1) & 0x55)
    halves = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (halves + (halves >> 4)) & 0x0F if per_byte else halves


def _to_bits(mask: Tensor) -> Tensor:
    """Turn bool [r, K] into uint8 [r, ceil(K/8)]."""
    eights = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    eights = eights.view(len(mask), -1, 8)
    packed = eights[:, :, 0].clone()
    for bit in range(1, 8):
        packed |= eights[:, :, bit] << bit
    return packed


def _from_bits(bitmask: Tensor, columns: int) -> Tensor:
    """Turn uint8 [r, ceil(K/8)] into bool [r, K]."""
    bits = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    mask = (bitmask.unsqueeze(-1) >> bits) & 1
    return mask.view(len(bitmask), -1)[:, :columns].contiguous().bool()
