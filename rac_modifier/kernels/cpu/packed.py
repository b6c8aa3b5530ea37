"""Weights in the kernels' own layout: packing, checking, unpacking. csrc/layout.h describes the layout."""

from __future__ import annotations

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import DENSE8, VALUE_TYPES
from rac_modifier.kernels.cpu.support import library_and_isa

PANEL = 16  # rows
MOST_GROUP = 512  # columns that share a scale, where a row has several
_UNPACK_BYTES = 32 << 20


def pack_values(values: Tensor, bitmask: Tensor, columns: int) -> Tensor:
    """The packed form, uint8 [bytes], of a sparse weight [N, columns].

    `values`: the stored values, row-major, of any shape (2:4 has [N, K/2]); bfloat16, float32, int8, or float16, which
    is converted to float32: bfloat16 would round. `bitmask`: uint8 [N, ceil(columns / 8)], bit i of byte j is column
    8j + i.

    Raises:
        RacError: the two do not fit together.
    """
    library, _ = library_and_isa()
    if values.dtype == torch.float16:
        values = values.float()
    if values.dtype not in VALUE_TYPES:
        raise RacError(f"values of {values.dtype}: the kernels read bfloat16, float32, float16 and int8; keep it dense")
    if bitmask.dtype != torch.uint8 or bitmask.dim() != 2:
        raise RacError(
            f"bitmask: {bitmask.dtype} {list(bitmask.shape)}, where uint8 [rows, ceil(columns / 8)] is needed"
        )
    rows = bitmask.shape[0]
    if rows < 1 or columns < 1 or bitmask.shape[1] != -(-columns // 8):
        raise RacError(
            f"bitmask: {list(bitmask.shape)} does not fit a weight with {columns} columns, "
            f"which has [rows, {-(-columns // 8)}]; the checkpoint is damaged"
        )
    for name, tensor in (("values", values), ("bitmask", bitmask)):
        if tensor.device.type != "cpu":
            raise RacError(f"{name}: on {tensor.device}, where the CPU is needed; move the tensor there")
    value_type = VALUE_TYPES[values.dtype]
    data = _allocate(rows, columns, values.numel(), value_type)
    library.pack(values.detach().contiguous(), bitmask.contiguous(), rows, columns, value_type, data)
    check_packed(data, rows, columns, values.dtype)
    return data


def pack_dense(weight: Tensor) -> Tensor:
    """The packed form, uint8 [bytes], of an int8 weight [N, K] of which all values are stored, without masks.

    Raises:
        RacError: another dtype, or not a matrix on the CPU.
    """
    if weight.dtype != torch.int8 or weight.dim() != 2 or weight.device.type != "cpu":
        raise RacError(
            f"weight: {weight.dtype} {list(weight.shape)} on {weight.device}; an int8 matrix on the CPU is needed"
        )
    rows, columns = weight.shape
    data = _allocate(rows, columns, weight.numel(), DENSE8)
    library_and_isa()[0].pack(weight.detach().contiguous(), None, rows, columns, DENSE8, data)
    check_packed(data, rows, columns, torch.int8, masked=False)
    return data


def pack_scale(scale: Tensor, group: int = 0) -> Tensor:
    """Scales [N, groups], one per row and group of columns, as the kernels read them: float32 [panels, groups, 16].

    Groups of more than 512 columns are split where `group` is that number of columns.
    """
    rows, groups = scale.shape
    if groups > 1 and group > MOST_GROUP:
        parts = next(n for n in range(2, group) if group % (4 * n) == 0 and group // n <= MOST_GROUP)
        scale, groups = scale.repeat_interleave(parts, dim=1), groups * parts
    padded = torch.nn.functional.pad(scale.float(), (0, 0, 0, -rows % PANEL))
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()


def check_packed(data: Tensor, rows: int, columns: int, dtype: torch.dtype, masked: bool = True) -> None:
    """Check everything in packed data that the kernels rely on. Data that passes makes no kernel read outside of it.

    Raises:
        RacError: data that is not a packed weight [rows, columns] of this dtype; `masked` False: int8 without masks.
    """
    if dtype not in VALUE_TYPES or not (masked or dtype == torch.int8):
        raise RacError(f"packed weight of {dtype}: values are bfloat16, float32 or int8; convert them first")
    if data.dtype != torch.uint8 or data.dim() != 1 or data.device.type != "cpu" or not data.is_contiguous():
        raise RacError(
            f"packed weight: {data.dtype} {list(data.shape)} on {data.device}, where contiguous 1-D uint8 on the CPU is "
            "needed; pass what `pack_values` returned"
        )
    if not all(isinstance(size, int) and 0 < size < 2**31 for size in (rows, columns)):
        raise RacError(f"packed weight of shape [{rows}, {columns}]: both must be between 1 and 2^31 - 1")
    library_and_isa()[0].check(data, rows, columns, VALUE_TYPES[dtype] if masked else DENSE8)


def unpack(data: Tensor, rows: int, columns: int) -> Tensor:
    """The dense weight [rows, columns], every stored bit unchanged. Needs 32 MiB or 16 rows beside the result.

    Raises:
        RacError: data that is not a packed weight of this shape.
    """
    library, isa = library_and_isa()
    value_type = library.value_type(data)
    dtype = next((d for d, number in VALUE_TYPES.items() if number == value_type), torch.int8)
    check_packed(data, rows, columns, dtype, masked=value_type != DENSE8)
    dense = torch.empty(rows, columns, dtype=dtype)
    panels = -(-rows // PANEL)
    expanded = torch.float32 if dtype == torch.int8 else dtype
    step = max(1, _UNPACK_BYTES // (columns * PANEL * expanded.itemsize))
    for first in range(0, panels, step):
        last = min(first + step, panels)
        transposed = torch.empty(columns, PANEL * (last - first), dtype=expanded)
        library.expand(data, rows, columns, first, last, transposed, isa)
        part = dense[first * PANEL : last * PANEL]
        part.copy_(transposed.t()[: len(part)])
    return dense


def _allocate(rows: int, columns: int, count: int, value_type: int) -> Tensor:
    nbytes = library_and_isa()[0].packed_bytes(rows, columns, count, value_type)
    if nbytes < 0:
        raise RacError(f"{count} values for a weight [{rows}, {columns}]: impossible; the checkpoint is damaged")
    return torch.empty(nbytes, dtype=torch.uint8)
