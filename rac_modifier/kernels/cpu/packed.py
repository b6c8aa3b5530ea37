"""A weight in the kernels' own layout: packing, checking, unpacking. The layout is described in csrc/layout.h."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import DENSE8, VALUE_TYPES, library

PANEL = 16  # rows
MOST_GROUP = 512  # columns that share one scale among several of a row
_UNPACK_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A weight [rows, columns] of `dtype` (bfloat16, float32 or int8), packed: `data` is uint8 [nbytes], aligned to 64 bytes.

    Made by `pack`, or from such data; what the kernels rely on is checked here, once. Do not write to `data`. `masked`
    False: int8 without masks, nothing left out, made by `pack_dense`.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    data: Tensor
    masked: bool = True

    def __post_init__(self) -> None:
        """Raise RacError for data that is not a packed weight of this shape and dtype."""
        if self.dtype not in VALUE_TYPES or not (self.masked or self.dtype == torch.int8):
            raise RacError(f"SparseWeight of {self.dtype}: values are bfloat16, float32 or int8; convert them first")
        data = self.data
        if data.dtype != torch.uint8 or data.dim() != 1 or data.device.type != "cpu" or not data.is_contiguous():
            raise RacError(
                f"SparseWeight data: {data.dtype} {list(data.shape)} on {data.device}, where contiguous 1-D uint8 on "
                "the CPU is needed; use what `pack` returned"
            )
        size = (self.rows, self.columns)
        if not all(isinstance(n, int) and 0 < n < 2**31 for n in size):
            raise RacError(f"SparseWeight of shape {list(size)}: both must be between 1 and 2^31 - 1")
        library()[0].check(data, self.rows, self.columns, VALUE_TYPES[self.dtype] if self.masked else DENSE8)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, offsets and padding included."""
        return self.data.numel()


def pack(values: Tensor, bitmask: Tensor, columns: int) -> SparseWeight:
    """The kernels' layout of a sparse weight [N, columns] from a checkpoint's two tensors.

    `values`: the stored values, row-major, of any shape (2:4 has [N, K/2]); bfloat16, float32, int8, or float16, which
    is converted to float32: bfloat16 would round. `bitmask`: uint8 [N, ceil(columns / 8)], bit i of byte j is column
    8j + i. Raise RacError where these do not fit together. The values of a weight are copied once, none is kept.
    """
    native, _ = library()
    if values.dtype == torch.float16:
        values = values.float()
    if values.dtype not in VALUE_TYPES:
        raise RacError(f"values of {values.dtype}: the kernels know bfloat16, float32, float16 and int8; keep it dense")
    if bitmask.dtype != torch.uint8 or bitmask.dim() != 2:
        raise RacError(
            f"bitmask: {bitmask.dtype} {list(bitmask.shape)}, where uint8 [rows, ceil(columns / 8)] is needed"
        )
    rows = bitmask.shape[0]
    if rows < 1 or columns < 1 or bitmask.shape[1] != -(-columns // 8):
        raise RacError(
            f"bitmask: {list(bitmask.shape)} is none of a weight with {columns} columns, "
            f"which has [rows, {-(-columns // 8)}]; the checkpoint is damaged"
        )
    for name, tensor in (("values", values), ("bitmask", bitmask)):
        if tensor.device.type != "cpu":
            raise RacError(f"{name}: on {tensor.device}; these kernels are the CPU's, so move it there")
    data = _room(rows, columns, values.numel(), VALUE_TYPES[values.dtype])
    native.pack(values.detach().contiguous(), bitmask.contiguous(), rows, columns, VALUE_TYPES[values.dtype], data)
    return SparseWeight(rows, columns, values.dtype, data)


def pack_dense(weight: Tensor) -> SparseWeight:
    """The kernels' layout of an int8 weight [N, K] as it is, without masks: a byte a weight.

    Raises:
        RacError: another dtype, or no matrix on the CPU.
    """
    if weight.dtype != torch.int8 or weight.dim() != 2 or weight.device.type != "cpu":
        raise RacError(
            f"weight: {weight.dtype} {list(weight.shape)} on {weight.device}; an int8 matrix on the CPU is needed"
        )
    rows, columns = weight.shape
    data = _room(rows, columns, weight.numel(), DENSE8)
    library()[0].pack(weight.detach().contiguous(), None, rows, columns, DENSE8, data)
    return SparseWeight(rows, columns, torch.int8, data, masked=False)


def pack_scale(scale: Tensor, group: int = 0) -> Tensor:
    """Scales [N, groups] of a weight's rows, or of each row's groups of columns, as the kernels read them.

    Returns float32 [panels, groups, 16]. Groups of more than 512 columns, if `group` says that they are, are split.
    """
    rows, groups = scale.shape
    if groups > 1 and group > MOST_GROUP:
        parts = next(n for n in range(2, group) if group % (4 * n) == 0 and group // n <= MOST_GROUP)
        scale, groups = scale.repeat_interleave(parts, dim=1), groups * parts
    padded = torch.nn.functional.pad(scale.float(), (0, 0, 0, -rows % PANEL))
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()


def _room(rows: int, columns: int, count: int, kind: int) -> Tensor:
    nbytes = library()[0].bytes(rows, columns, count, kind)
    if nbytes < 0:
        raise RacError(f"{count} values for a weight [{rows}, {columns}]: impossible; the checkpoint is damaged")
    return torch.empty(nbytes, dtype=torch.uint8)


def unpack(weight: SparseWeight) -> Tensor:
    """The dense weight [rows, columns], every stored bit as it was. Takes 32 MiB or 16 rows beside the result."""
    native, isa = library()
    dense = torch.empty(weight.rows, weight.columns, dtype=weight.dtype)
    panels = -(-weight.rows // PANEL)
    expanded = torch.float32 if weight.dtype == torch.int8 else weight.dtype
    step = max(1, _UNPACK_BYTES // (weight.columns * PANEL * expanded.itemsize))
    for first in range(0, panels, step):
        last = min(first + step, panels)
        transposed = torch.empty(weight.columns, PANEL * (last - first), dtype=expanded)
        native.expand(weight.data, first, last, transposed, isa)
        part = dense[first * PANEL : last * PANEL]
        part.copy_(transposed.t()[: len(part)])
    return dense
