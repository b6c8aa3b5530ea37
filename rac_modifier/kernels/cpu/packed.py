"""Weights in the kernels' layout: packing, checking, unpacking. csrc/format/layout.h describes the layout."""

from __future__ import annotations

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import BITS, DENSE_TYPES, INT4, VALUE_TYPES
from rac_modifier.kernels.cpu.support import library_and_isa

PANEL = 16  # rows
MOST_GROUP = 512  # columns that share a scale, where a row has several
_UNPACK_BYTES = 32 << 20


def pack_values(
    values: Tensor, bitmask: Tensor, columns: int, bits: int = 8, zeros: Tensor | None = None
) -> Tensor:
    """The packed form, uint8 [bytes], of a sparse weight [N, columns].

    `values`: the stored values, row-major, of any shape (2:4 has [N, K/2]); bfloat16, float32, int8, or
    float16, which becomes float32: bfloat16 would round. `bitmask`: uint8 [N, ceil(columns / 8)], bit i of
    byte j is column 8j + i. `bits` 4: int8 values are packed as codes of four bits, -8 to 7. `zeros`: the
    codes of zero of such values, uint8 [N, groups], 0 to 15 per row and group of columns; a value is then a
    code minus its code of zero.

    Raises:
        RacError: these do not fit together.
    """
    if values.dtype == torch.float16:
        values = values.float()
    if values.dtype not in VALUE_TYPES:
        raise RacError(
            f"values of {values.dtype}: the kernels read bfloat16, float32, float16 and int8; keep it dense"
        )
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
            raise RacError(
                f"{name}: on {tensor.device}, where the CPU is needed; move the tensor there"
            )
    value_type = _type_of(values.dtype, True, bits)
    return _pack(values, bitmask.contiguous(), zeros, (rows, columns), value_type)


def pack_dense(weight: Tensor, bits: int = 8, zeros: Tensor | None = None) -> Tensor:
    """The packed form, uint8 [bytes], of an int8 weight [N, K] of which all values are stored, without masks.

    `bits`: 8, or 4, 3 or 2 for values that are packed as codes; `zeros` as for `pack_values`. Groups must have
    a multiple of `UNIT[bits]` columns (encoding.py).

    Raises:
        RacError: another dtype, or not a matrix on the CPU; or values that do not fit these bits.
    """
    if weight.dtype != torch.int8 or weight.dim() != 2 or weight.device.type != "cpu":
        raise RacError(
            f"weight: {weight.dtype} {list(weight.shape)} on {weight.device}; an int8 matrix on the CPU is needed"
        )
    rows, columns = weight.shape
    if zeros is None and bits < 4:  # these always have codes of zero
        zeros = torch.full((rows, 1), 1 << (bits - 1), dtype=torch.uint8)
    return _pack(weight, None, zeros, (rows, columns), _type_of(torch.int8, False, bits))


def split_groups(scale: Tensor, group: int, unit: int = 4) -> Tensor:
    """Scales [N, groups], with groups of more than 512 columns cut into equal parts of a multiple of `unit` columns."""
    if scale.shape[1] == 1 or group <= MOST_GROUP:
        return scale
    return scale.repeat_interleave(_parts(group, unit), dim=1)


def block_of(columns: int, group: int, unit: int = 4) -> int:
    """Columns of x that share a scale in a matmul with integers of which `group` of `columns` columns share a scale."""
    if group == columns:
        return min(columns, MOST_GROUP)
    return group if group <= MOST_GROUP else group // _parts(group, unit)


def set_activation_bits(data: Tensor, bits: int) -> None:
    """Have x rounded to 8 bits, or to 16 as when `data` was packed, in matmuls with these packed integers.

    Kernels that do not multiply bytes round to 16 bits in any case.

    Raises:
        RacError: other bits, or packed floats.
    """
    library_and_isa()[0].set_activation_bits(data, bits)


def pack_scale(
    scale: Tensor, group: int = 0, narrow: bool = False, unit: int | None = None
) -> Tensor:
    """Scales [N, groups] as the kernels read them: float32 [panels, groups, 16].

    Groups of more than 512 columns are split where `group` is that number of columns. `narrow`: bfloat16
    where this holds every scale exactly, as for a bfloat16 checkpoint; only values of 4 bits or less may have
    such scales. `unit`: that of `split_groups`, by default 8 with `narrow` and else 4.
    """
    packed = _panels(split_groups(scale, group, unit or (8 if narrow else 4)).float())
    exact = narrow and torch.equal(packed.bfloat16().float(), packed)
    return packed.bfloat16() if exact else packed


def check_packed(
    data: Tensor, rows: int, columns: int, dtype: torch.dtype, masked: bool = True, bits: int = 8
) -> None:
    """Check everything in packed data that the kernels rely on. They read nothing outside of data that passes.

    `masked` False: int8 without masks; `bits` 4, 3 or 2: int8 packed as codes.

    Raises:
        RacError: data that is not a packed weight [rows, columns] of this dtype.
    """
    if dtype not in VALUE_TYPES or not ((masked and bits == 8) or dtype == torch.int8):
        raise RacError(
            f"packed weight of {dtype}: values are bfloat16, float32 or int8; convert them first"
        )
    one_dimension = data.dim() == 1 and data.is_contiguous()
    if data.dtype != torch.uint8 or not one_dimension or data.device.type != "cpu":
        raise RacError(
            f"packed weight: {data.dtype} {list(data.shape)} on {data.device}, where contiguous 1-D uint8 on "
            "the CPU is needed; pass what `pack_values` returned"
        )
    if not all(isinstance(size, int) and 0 < size < 2**31 for size in (rows, columns)):
        raise RacError(
            f"packed weight of shape [{rows}, {columns}]: both must be between 1 and 2^31 - 1"
        )
    library_and_isa()[0].check(data, rows, columns, _type_of(dtype, masked, bits))


def unpack(data: Tensor, rows: int, columns: int) -> Tensor:
    """The dense weight [rows, columns], every stored bit unchanged. Needs 32 MiB or 16 rows next to the result.

    Raises:
        RacError: data that is not a packed weight of this shape.
    """
    library, isa = library_and_isa()
    value_type = library.value_type(data)
    dtype = next((d for d, number in VALUE_TYPES.items() if number == value_type), torch.int8)
    masked = value_type not in DENSE_TYPES.values()
    check_packed(data, rows, columns, dtype, masked, BITS.get(value_type, 8))
    dense = torch.empty(rows, columns, dtype=dtype)
    panels = -(-rows // PANEL)
    expanded = torch.float32 if dtype == torch.int8 else dtype
    step = max(1, _UNPACK_BYTES // (columns * PANEL * expanded.itemsize))
    for first in range(0, panels, step):
        last = min(first + step, panels)
        transposed = torch.empty(columns, PANEL * (last - first), dtype=expanded)
        library.expand(data, rows, columns, first, last, transposed, isa)
        chunk = dense[first * PANEL : last * PANEL]
        chunk.copy_(transposed.t()[: len(chunk)])
    return dense


def _parts(group: int, unit: int) -> int:
    return next(n for n in range(2, group) if group % (unit * n) == 0 and group // n <= MOST_GROUP)


def _pack(
    values: Tensor,
    bitmask: Tensor | None,
    zeros: Tensor | None,
    shape: tuple[int, int],
    value_type: int,
) -> Tensor:
    library, _ = library_and_isa()
    groups = 0 if zeros is None else zeros.shape[1]
    if zeros is not None:
        fits = value_type in BITS and zeros.dtype == torch.uint8 and zeros.shape[0] == shape[0]
        if not fits or not groups or shape[1] % groups:
            raise RacError(
                f"zeros: {zeros.dtype} {list(zeros.shape)}; codes of a weight {list(shape)} need uint8 "
                f"[{shape[0]}, groups]"
            )
        zeros = _panels(zeros)
    nbytes = library.packed_bytes(*shape, values.numel(), value_type, bitmask, groups)
    if nbytes < 0:
        raise RacError(
            f"{values.numel()} values for a weight {list(shape)}: impossible; the checkpoint is damaged"
        )
    data = torch.empty(nbytes, dtype=torch.uint8)
    library.pack(values.detach().contiguous(), bitmask, zeros, shape, value_type, data)
    library.check(data, *shape, value_type)
    return data


def _type_of(dtype: torch.dtype, masked: bool, bits: int) -> int:
    """The library's number for values of `dtype` in `bits` (of int8) with masks or without."""
    if not masked:
        return DENSE_TYPES[bits]
    return INT4 if dtype == torch.int8 and bits == 4 else VALUE_TYPES[dtype]


def _panels(of_rows: Tensor) -> Tensor:
    """[N, groups] to [panels, groups, 16], with zeros for the rows that pad the last panel."""
    rows, groups = of_rows.shape
    padded = torch.nn.functional.pad(of_rows, (0, 0, 0, -rows % PANEL))
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()
