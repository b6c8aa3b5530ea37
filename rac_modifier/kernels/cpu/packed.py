"""Weights in the kernels' own layout: packing, checking, unpacking. csrc/layout.h describes the layout."""

from __future__ import annotations

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import BITS, DENSE_TYPES, INT4, PLANES4, VALUE_TYPES
from rac_modifier.kernels.cpu.support import library_and_isa

PANEL = 16  # rows
MOST_GROUP = 512  # columns that share a scale, where a row has several
_TILE = 32  # columns of a mask word of PLANES4
_UNPACK_BYTES = 32 << 20


def pack_values(
    values: Tensor,
    bitmask: Tensor,
    columns: int,
    bits: int = 8,
    zeros: Tensor | None = None,
    group: int = 0,
) -> Tensor:
    """The packed form, uint8 [bytes], of a sparse weight [N, columns].

    `values`: the stored values, row-major, of any shape (2:4 has [N, K/2]); bfloat16, float32, int8, or float16, which
    is converted to float32: bfloat16 would round. `bitmask`: uint8 [N, ceil(columns / 8)], bit i of byte j is column
    8j + i. `bits` 4: int8 values are kept as codes of four bits, -8 to 7. `zeros`: the codes of zero of such values, uint8
    [N, groups], 0 to 15 for each row and group of columns; a value is then a code minus its code of zero. `group`: how many
    columns share a scale. With this number, 4-bit values are packed as this processor multiplies them fastest; with 0 the
    scales may be in any groups.

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
    if value_type == INT4:
        value_type = sparse_int4_type(columns, group)
    return _pack(values, bitmask.contiguous(), _panels(zeros), rows, columns, value_type)


def pack_dense(weight: Tensor, bits: int = 8, zeros: Tensor | None = None) -> Tensor:
    """The packed form, uint8 [bytes], of an int8 weight [N, K] of which all values are stored, without masks.

    `bits`: 8, or 4, 3 or 2 for values that are kept as codes of so many bits; `zeros` as for `pack_values`. Groups must have a
    multiple of `UNIT[bits]` columns (encoding.py).

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
    return _pack(weight, None, _panels(zeros), rows, columns, _type_of(weight.dtype, False, bits))


def sparse_int4_type(columns: int, group: int) -> int:
    """INT4, or PLANES4 where this processor multiplies that faster and `group` columns that share a scale allow it."""
    library, isa = library_and_isa()
    whole = group > 0 and (group == columns or block_of(columns, group, 8) % _TILE == 0)
    return library.sparse_int4_type(isa) if whole else INT4


def split_groups(scale: Tensor, group: int, unit: int = 4) -> Tensor:
    """Scales [N, groups], with groups of more than 512 columns cut into equal parts of a multiple of `unit` columns."""
    if scale.shape[1] == 1 or group <= MOST_GROUP:
        return scale
    return scale.repeat_interleave(_parts(group, unit), dim=1)


def block_of(columns: int, group: int, unit: int = 4) -> int:
    """Columns of x that share a scale in a product with integers of which `group` of `columns` columns share one."""
    if group == columns:
        return min(columns, MOST_GROUP)
    return group if group <= MOST_GROUP else group // _parts(group, unit)


def set_activation_bits(data: Tensor, bits: int) -> None:
    """Have x rounded to 8 bits, or to 16 as when `data` was packed, in products with these packed integers.

    Instruction sets that do not multiply bytes (`BYTE_ISAS`) round to 16 bits in any case.

    Raises:
        RacError: other bits, or packed floats.
    """
    library_and_isa()[0].set_activation_bits(data, bits)


def pack_scale(
    scale: Tensor, group: int = 0, narrow: bool = False, unit: int | None = None
) -> Tensor:
    """Scales [N, groups], one per row and group of columns, as the kernels read them: float32 [panels, groups, 16].

    Groups of more than 512 columns are split where `group` is that number of columns. `narrow`: bfloat16 where this holds
    every one exactly, as for the scales of a bfloat16 checkpoint; only values of 4 bits or less may have such scales. `unit`:
    that of `split_groups`, by default 8 with `narrow` and else 4.
    """
    packed = _panels(split_groups(scale, group, unit or (8 if narrow else 4)).float())
    assert packed is not None
    return (
        packed.bfloat16() if narrow and torch.equal(packed.bfloat16().float(), packed) else packed
    )


def check_packed(
    data: Tensor, rows: int, columns: int, dtype: torch.dtype, masked: bool = True, bits: int = 8
) -> None:
    """Check everything in packed data that the kernels rely on. Data that passes makes no kernel read outside of it.

    Raises:
        RacError: data that is not a packed weight [rows, columns] of this dtype; `masked` False: int8 without masks, `bits` 4, 3
            or 2: int8 kept as codes of so many bits.
    """
    if dtype not in VALUE_TYPES or not ((masked and bits == 8) or dtype == torch.int8):
        raise RacError(
            f"packed weight of {dtype}: values are bfloat16, float32 or int8; convert them first"
        )
    if (
        data.dtype != torch.uint8
        or data.dim() != 1
        or data.device.type != "cpu"
        or not data.is_contiguous()
    ):
        raise RacError(
            f"packed weight: {data.dtype} {list(data.shape)} on {data.device}, where contiguous 1-D uint8 on the CPU is "
            "needed; pass what `pack_values` returned"
        )
    if not all(isinstance(size, int) and 0 < size < 2**31 for size in (rows, columns)):
        raise RacError(
            f"packed weight of shape [{rows}, {columns}]: both must be between 1 and 2^31 - 1"
        )
    library, value_type = library_and_isa()[0], _type_of(dtype, masked, bits)
    if value_type == INT4 and library.value_type(data) == PLANES4:
        value_type = PLANES4
    library.check(data, rows, columns, value_type)


def unpack(data: Tensor, rows: int, columns: int) -> Tensor:
    """The dense weight [rows, columns], every stored bit unchanged. Needs 32 MiB or 16 rows beside the result.

    Raises:
        RacError: data that is not a packed weight of this shape.
    """
    library, isa = library_and_isa()
    value_type = library.value_type(data)
    dtype = next((d for d, number in VALUE_TYPES.items() if number == value_type), torch.int8)
    check_packed(
        data, rows, columns, dtype, value_type not in DENSE_TYPES.values(), BITS.get(value_type, 8)
    )
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


def _parts(group: int, unit: int) -> int:
    return next(n for n in range(2, group) if group % (unit * n) == 0 and group // n <= MOST_GROUP)


def _pack(
    values: Tensor,
    bitmask: Tensor | None,
    zeros: Tensor | None,
    rows: int,
    columns: int,
    value_type: int,
) -> Tensor:
    library, _ = library_and_isa()
    groups = 0 if zeros is None else zeros.shape[1]
    if zeros is not None and (
        value_type not in BITS
        or zeros.dtype != torch.uint8
        or zeros.shape[0] != -(-rows // PANEL)
        or not groups
        or columns % groups
    ):
        raise RacError(
            f"zeros: {zeros.dtype}, {groups} groups; codes of a weight [{rows}, {columns}] need uint8 [{rows}, groups]"
        )
    nbytes = library.packed_bytes(rows, columns, values.numel(), value_type, bitmask, groups)
    if nbytes < 0:
        raise RacError(
            f"{values.numel()} values for a weight [{rows}, {columns}]: impossible; the checkpoint is damaged"
        )
    data = torch.empty(nbytes, dtype=torch.uint8)
    library.pack(values.detach().contiguous(), bitmask, zeros, rows, columns, value_type, data)
    library.check(data, rows, columns, value_type)
    return data


def _type_of(dtype: torch.dtype, masked: bool, bits: int) -> int:
    """The number that the library has for values of `dtype` in `bits` (of int8) with masks or without."""
    if not masked:
        return DENSE_TYPES[bits]
    return INT4 if dtype == torch.int8 and bits == 4 else VALUE_TYPES[dtype]


def _panels(of_rows: Tensor | None) -> Tensor | None:
    """[N, groups] to [panels, groups, 16], with zeros for the rows that pad the last panel."""
    if of_rows is None:
        return None
    rows, groups = of_rows.shape
    padded = torch.nn.functional.pad(of_rows, (0, 0, 0, -rows % PANEL))
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()
