"""The two bitmask layouts of a sparse matrix: pure functions from a dense [N, K] weight to named tensors and back.

Both keep a row-major bitmask, uint8 [N, ceil(K/8)], where bit i of byte j is column 8j+i, and the kept values in
row-major order. They are the layouts that compressed-tensors up to 0.14 called sparse-24-bitmask and sparse-bitmask.

Only +0.0 is left out: -0.0 is a value to keep, so that unpacking returns the same bits. The one exception is a 2:4 group
with more -0.0 than it has room for: those that do not fit come back as +0.0. Weights are handled as integers of the same
width, so NaN payloads are not changed, and one chunk of rows at a time, so little memory is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Weights per chunk of rows; each is expanded to a byte, and for a moment to an int64.
_CHUNK = 1 << 20


def pack_24(weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
    """Pack a 2:4 weight [N, K]: `compressed` [N, K/2] of its dtype, `bitmask`, and `shape` int64 [2, 1].

    Every group of four columns stores exactly two values. If it has fewer than two nonzeros, zeros are stored as well (first
    -0.0, then the leftmost +0.0). `shape` is a column because vLLM up to 0.18 loads it into a [2, 1] parameter.

    Raises:
        RacError: not 2-D, an unsupported dtype, K no multiple of 4, or a group of more than two nonzeros.
    """
    rows, columns = _check_weight(weight, name)
    if columns % 4:
        raise RacError(
            f"{name}: {columns} columns are no multiple of 4, so it cannot be packed as 2:4; pack as unstructured"
        )
    compressed = torch.empty(rows, columns // 2, dtype=weight.dtype, device=weight.device)
    bitmask = torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device=weight.device)
    for part in row_chunks(rows, columns):
        values = _as_integers(weight[part])
        keep = _two_of_four(values, nonzero(weight[part]), name, part.start)
        _as_integers(compressed)[part] = values[keep].view(-1, columns // 2)
        bitmask[part] = _to_bitmask(keep)
    shape = torch.tensor([[rows], [columns]], dtype=torch.int64)
    return {"compressed": compressed, "bitmask": bitmask, "shape": shape}


def unpack_24(tensors: Mapping[str, Tensor], name: str = "weight") -> Tensor:
    """The dense weight [N, K] that was given to `pack_24`, with the same bits.

    Raises:
        RacError: naming `{name}.{part}`, where the parts are missing, malformed or contradict each other.
    """
    compressed, bitmask, rows, columns = check_parts(tensors, name)
    if columns % 4 or tuple(compressed.shape) != (rows, columns // 2):
        raise RacError(
            f"{name}.compressed: shape {list(compressed.shape)} does not fit a 2:4 weight [{rows}, {columns}], which "
            f"stores [{rows}, {columns // 2}]; the checkpoint is damaged or not 2:4"
        )
    dense = torch.zeros(rows, columns, dtype=compressed.dtype, device=compressed.device)
    for part in row_chunks(rows, columns):
        mask = _from_bitmask(bitmask[part], columns)
        if not bool((_group_counts(mask) == 2).all()):
            raise RacError(
                f"{name}.bitmask: a group of four columns does not keep exactly two; the checkpoint is damaged"
            )
        _as_integers(dense)[part].masked_scatter_(mask, _as_integers(compressed)[part].contiguous())
    return dense


def pack_unstructured(weight: Tensor, name: str = "weight") -> dict[str, Tensor]:
    """Pack any weight [N, K]: `compressed` 1-D values, `bitmask`, `row_offsets` int64 [N] and `shape` int64 [2].

    `row_offsets[r]` is where row r starts in `compressed`.

    Raises:
        RacError: not 2-D, or an unsupported dtype.
    """
    rows, columns = _check_weight(weight, name)
    bitmask = torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device=weight.device)
    for part in row_chunks(rows, columns):
        bitmask[part] = _to_bitmask(_as_integers(weight[part]) != 0)
    counts = row_counts(bitmask)
    ends = counts.cumsum(0)
    starts = ends - counts
    compressed = torch.empty(int(ends[-1]), dtype=weight.dtype, device=weight.device)
    for part in row_chunks(rows, columns):
        values = _as_integers(weight[part])
        _as_integers(compressed)[int(starts[part.start]) : int(ends[part.stop - 1])] = values[
            values != 0
        ]
    shape = torch.tensor([rows, columns], dtype=torch.int64)
    return {"compressed": compressed, "bitmask": bitmask, "row_offsets": starts, "shape": shape}


def unpack_unstructured(tensors: Mapping[str, Tensor], name: str = "weight") -> Tensor:
    """The dense weight [N, K] that was given to `pack_unstructured`, with the same bits.

    Raises:
        RacError: naming `{name}.{part}`, where the parts are missing, malformed or contradict each other.
    """
    compressed, bitmask, rows, columns = check_parts(tensors, name)
    counts = row_counts(bitmask)
    ends = counts.cumsum(0)
    starts = ends - counts
    if compressed.dim() != 1 or compressed.numel() != int(ends[-1]):
        raise RacError(
            f"{name}.compressed: shape {list(compressed.shape)}, but the bitmask keeps {int(ends[-1])} values; "
            "the checkpoint is damaged"
        )
    offsets = part_of(tensors, name, "row_offsets")
    if offsets.dtype != torch.int64 or not torch.equal(offsets.to(starts.device), starts):
        raise RacError(
            f"{name}.row_offsets: not int64 [{rows}] row starts as the bitmask has them; the checkpoint is damaged"
        )
    dense = torch.zeros(rows, columns, dtype=compressed.dtype, device=compressed.device)
    for part in row_chunks(rows, columns):
        mask = _from_bitmask(bitmask[part], columns)
        values = _as_integers(compressed)[int(starts[part.start]) : int(ends[part.stop - 1])]
        _as_integers(dense)[part].masked_scatter_(mask, values)
    return dense


def nonzero(weight: Tensor) -> Tensor:
    """Bool mask of the values other than 0.0 and -0.0, also for the 8-bit floats, which torch cannot compare."""
    integers = _as_integers(weight)
    # The shift removes the sign bit, so that -0.0 becomes 0 and nothing else does.
    return (integers << 1 if weight.is_floating_point() else integers) != 0


def count_zeros(weight: Tensor) -> int:
    """How many weights [N, K] are 0.0 or -0.0."""
    rows, columns = weight.shape
    return sum(int((~nonzero(weight[part])).sum()) for part in row_chunks(rows, columns))


def _two_of_four(values: Tensor, kept: Tensor, name: str, first_row: int) -> Tensor:
    """Choose exactly two of every four columns: first the nonzeros (`kept`), then -0.0, then +0.0, from the left."""
    groups, keep = values.reshape(-1, 4), kept.reshape(-1, 4)
    counts = _group_counts(keep)
    if bool((counts == 2).all()):  # the usual case, and much cheaper than choosing
        return kept
    crowded = (counts > 2).nonzero()
    if len(crowded):
        row, group = divmod(int(crowded[0]), values.shape[1] // 4)
        raise RacError(
            f"{name}: {len(crowded)} or more groups hold more than 2 nonzeros, the first in row {first_row + row}, "
            f"columns {4 * group}-{4 * group + 3}; the weight is not 2:4: pack it as unstructured, or prune it again"
        )
    for candidates in (groups != 0, torch.ones_like(keep)):
        free = candidates & ~keep
        keep = keep | (free & (free.cumsum(dim=1) <= 2 - keep.sum(dim=1, keepdim=True)))
    return keep.view(values.shape)


def _group_counts(mask: Tensor) -> Tensor:
    """How many of each four columns are set, as uint8. A `sum` over such a short dimension is several times slower."""
    flags = mask.view(torch.uint8).view(-1, 4)
    return flags[:, 0] + flags[:, 1] + flags[:, 2] + flags[:, 3]


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that together cover a matrix; an elementwise step on one of them needs little memory."""
    step = max(1, _CHUNK // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGER[tensor.element_size()])


def _to_bitmask(mask: Tensor) -> Tensor:
    """Bool [r, K] to uint8 [r, ceil(K/8)]."""
    columns = mask.shape[1]
    eights = torch.nn.functional.pad(mask.to(torch.uint8), (0, -columns % 8)).view(len(mask), -1, 8)
    packed = eights[:, :, 0].clone()
    for bit in range(1, 8):
        packed |= eights[:, :, bit] << bit
    return packed


def _from_bitmask(bitmask: Tensor, columns: int) -> Tensor:
    """Uint8 [r, ceil(K/8)] to bool [r, K]."""
    bits = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    mask = (bitmask.unsqueeze(-1) >> bits) & 1
    return mask.view(len(bitmask), -1)[:, :columns].contiguous().bool()


def row_counts(bitmask: Tensor) -> Tensor:
    """Set bits of every row, int64 [N]."""
    pairs = bitmask - ((bitmask >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(dim=1, dtype=torch.int64)


def _check_weight(weight: Tensor, name: str) -> tuple[int, int]:
    if weight.dim() != 2 or not weight.numel():
        raise RacError(
            f"{name}: shape {list(weight.shape)}; only non-empty matrices [N, K] can be packed, so leave it dense"
        )
    if weight.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise RacError(
            f"{name}: dtype {weight.dtype} cannot be packed; convert it to one of {known}, or leave it dense"
        )
    return weight.shape[0], weight.shape[1]


def part_of(tensors: Mapping[str, Tensor], name: str, part: str) -> Tensor:
    """The tensor `name.part`, or the error that it is missing."""
    if part not in tensors:
        raise RacError(
            f"{name}.{part}: missing from the checkpoint; copy or save the checkpoint again"
        )
    return tensors[part]


def check_mask(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, int, int]:
    """The bitmask, N and K, checked before anything is indexed with them.

    Raises:
        RacError: naming `{name}.{part}`, where one of them is missing or malformed.
    """
    bitmask, shape = part_of(tensors, name, "bitmask"), part_of(tensors, name, "shape")
    if shape.dtype != torch.int64 or shape.numel() != 2:
        raise RacError(
            f"{name}.shape: {shape.dtype} {list(shape.shape)} instead of two int64; the checkpoint is damaged"
        )
    rows, columns = shape.flatten().tolist()
    if (
        bitmask.dtype != torch.uint8
        or rows < 1
        or columns < 1
        or tuple(bitmask.shape) != (rows, -(-columns // 8))
    ):
        raise RacError(
            f"{name}.bitmask: {bitmask.dtype} {list(bitmask.shape)} is no uint8 bitmask of a weight [{rows}, {columns}], "
            f"the size in {name}.shape; the checkpoint is damaged"
        )
    if columns % 8 and bool((bitmask[:, -1] >> (columns % 8)).any()):
        raise RacError(
            f"{name}.bitmask: bits are set beyond column {columns}; the checkpoint is damaged"
        )
    return bitmask, rows, columns


def check_parts(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor, int, int]:
    """The values, and what `check_mask` returns: compressed, bitmask, N and K."""
    compressed = part_of(tensors, name, "compressed")
    bitmask, rows, columns = check_mask(tensors, name)
    if compressed.dtype not in DTYPES:
        raise RacError(
            f"{name}.compressed: weights are not packed in dtype {compressed.dtype}; the checkpoint is damaged"
        )
    return compressed, bitmask, rows, columns
