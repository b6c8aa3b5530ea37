"""Weights in the kernels' layout, which csrc/format/layout.h describes."""

from __future__ import annotations

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import BITS, DENSE_TYPES, INT4, VALUE_TYPES
from rac_modifier.kernels.cpu.support import library_and_isa

PANEL = 16  # rows
MOST_GROUP = 512  # columns that share a scale, where a row has several


def pack_values(
    values: Tensor, bitmask: Tensor, columns: int, bits: int = 8, zeros: Tensor | None = None
) -> Tensor:
    """Pack a sparse weight [N, columns]: uint8 [bytes].

    Args:
        values: the stored values, row-major, of any shape; bfloat16, float32, int8, or
            float16, which becomes float32.
        bitmask: uint8 [N, ceil(columns / 8)]; bit i of byte j is column 8j + i.
        columns: of the weight.
        bits: 4 packs int8 values as codes of four bits.
        zeros: codes of zero, uint8 [N, groups], 0 to 15; a value is a code minus its code of zero.

    Raises:
        RacError: these do not fit together.
    """
    if values.dtype == torch.float16:
        values = values.float()
    if values.dtype not in VALUE_TYPES:
        raise RacError(
            f"values of {values.dtype}: the kernels read bfloat16, float32, float16 and int8; "
            "keep it dense"
        )
    if bitmask.dtype != torch.uint8 or bitmask.dim() != 2:
        raise RacError(
            f"bitmask: {bitmask.dtype} {list(bitmask.shape)}, where uint8 "
            "[rows, ceil(columns / 8)] is needed"
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
    value_type = INT4 if (values.dtype, bits) == (torch.int8, 4) else VALUE_TYPES[values.dtype]
    return _pack(values, bitmask.contiguous(), zeros, (rows, columns), value_type)


def pack_dense(weight: Tensor, bits: int = 8, zeros: Tensor | None = None) -> Tensor:
    """Pack an int8 weight [N, K] without masks: uint8 [bytes].

    `bits`: 8, or 4, 3 or 2 for values packed as codes; `zeros` as for `pack_values`. Groups have a
    multiple of `UNIT[bits]` columns.

    Raises:
        RacError: another dtype, or not a matrix on the CPU; or values that do not fit these bits.
    """
    if weight.dtype != torch.int8 or weight.dim() != 2 or weight.device.type != "cpu":
        raise RacError(
            f"weight: {weight.dtype} {list(weight.shape)} on {weight.device}; an int8 matrix on "
            "the CPU is needed"
        )
    rows, columns = weight.shape
    if zeros is None and bits < 4:  # these always have codes of zero
        zeros = torch.full((rows, 1), 1 << (bits - 1), dtype=torch.uint8)
    return _pack(weight, None, zeros, (rows, columns), DENSE_TYPES[bits])


def split_groups(scale: Tensor, group: int, unit: int = 4) -> Tensor:
    """Cut groups of more than 512 columns into equal ones of a multiple of `unit` columns."""
    if scale.shape[1] == 1 or group <= MOST_GROUP:
        return scale
    return scale.repeat_interleave(_pieces(group, unit), dim=1)


def block_of(columns: int, group: int, unit: int = 4) -> int:
    """Return how many columns of x share a scale in a matmul of integers in groups of `group`."""
    if group == columns:
        return min(columns, MOST_GROUP)
    return group if group <= MOST_GROUP else group // _pieces(group, unit)


def set_activation_bits(data: Tensor, bits: int) -> None:
    """Have x rounded to 8 bits, or to 16 like after packing, in matmuls with packed integers.

    Kernels that do not multiply bytes round to 16 bits in any case.

    Raises:
        RacError: other bits, or packed floats.
    """
    library_and_isa()[0].set_activation_bits(data, bits)


def pack_scale(
    scale: Tensor, group: int = 0, narrow: bool = False, unit: int | None = None
) -> Tensor:
    """Return scales [N, groups] in the kernels' layout: float32 [panels, groups, 16].

    `group` and `unit` (default: 8 with `narrow`, else 4) as for `split_groups`. `narrow`: bfloat16
    where it holds every scale exactly; only values of 4 bits or less may have such scales.
    """
    packed = _panels(split_groups(scale, group, unit or (8 if narrow else 4)).float())
    exact = narrow and torch.equal(packed.bfloat16().float(), packed)
    return packed.bfloat16() if exact else packed


def _pieces(group: int, unit: int) -> int:
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
                f"zeros: {zeros.dtype} {list(zeros.shape)}; codes of a weight {list(shape)} need "
                f"uint8 [{shape[0]}, groups]"
            )
        zeros = _panels(zeros)
    nbytes = library.packed_bytes(*shape, values.numel(), value_type, bitmask, groups)
    if nbytes < 0:
        raise RacError(
            f"{values.numel()} values for a weight {list(shape)}: impossible; the checkpoint is "
            "damaged"
        )
    data = torch.empty(nbytes, dtype=torch.uint8)
    library.pack(values.detach().contiguous(), bitmask, zeros, shape, value_type, data)
    library.check(data, *shape, value_type)
    return data


def _panels(by_row: Tensor) -> Tensor:
    """Return [N, groups] as [panels, groups, 16], with zeros for the rows that pad a panel."""
    rows, groups = by_row.shape
    padded = torch.nn.functional.pad(by_row, (0, 0, 0, -rows % PANEL))
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()
