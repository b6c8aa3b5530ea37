"""Rows of a packed weight, as an embedding needs them: an opaque torch operator, `torch.ops.rac_modifier.packed_rows`.

A lookup expands a panel of 16 rows to take one row. That is little next to a layer of a model, and an embedding
that is the output head, too, needs no second copy of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.backend import DATA, SCALE
from rac_modifier.kernels.cpu.packed import PANEL
from rac_modifier.kernels.cpu.support import library_and_isa


def lookup(
    ids: Tensor, packed: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Rows `ids` (int64, any shape) of a packed weight [rows, columns], scales multiplied in: [*ids.shape, columns].

    `packed` is what `pack` returned. Works under torch.compile.

    Raises:
        RacError: an id that is no row of the weight.
    """
    data, scale = packed[DATA], packed.get(SCALE)
    return torch.ops.rac_modifier.packed_rows(ids, data, rows, columns, scale, dtype)


def _packed_rows(
    ids: Tensor, data: Tensor, rows: int, columns: int, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    library, isa = library_and_isa()
    ordered, order = ids.flatten().sort()
    out = torch.empty(len(ordered), columns, dtype=dtype)
    if not len(ordered):
        return out.view(*ids.shape, columns)
    if int(ordered[0]) < 0 or int(ordered[-1]) >= rows:
        raise RacError(
            f"ids {int(ordered[0])} to {int(ordered[-1])}: the weight has rows 0 to {rows - 1}"
        )
    panels, counts = (ordered // PANEL).unique_consecutive(return_counts=True)
    expanded = torch.empty(columns, PANEL)
    starts = (counts.cumsum(0) - counts).tolist()
    for panel, start, count in zip(panels.tolist(), starts, counts.tolist(), strict=True):
        library.expand(data, rows, columns, panel, panel + 1, expanded, isa)
        if scale is not None:  # [groups, columns of a group, 16] times [groups, 1, 16]
            expanded.view(scale.shape[1], -1, PANEL).mul_(scale[panel].float()[:, None])
        taken = slice(start, start + count)
        out[order[taken]] = expanded[:, ordered[taken] % PANEL].t().to(dtype)
    return out.view(*ids.shape, columns)


def _fake(
    ids: Tensor, data: Tensor, rows: int, columns: int, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return data.new_empty(*ids.shape, columns, dtype=dtype)


# Once per process, also if this module is loaded again.
if not hasattr(torch.ops.rac_modifier, "packed_rows"):
    _ARGUMENTS = "Tensor ids, Tensor data, int rows, int columns, Tensor? scale, ScalarType dtype"
    torch.library.define("rac_modifier::packed_rows", f"({_ARGUMENTS}) -> Tensor")
    torch.library.impl("rac_modifier::packed_rows", "cpu", _packed_rows)
    torch.library.register_fake("rac_modifier::packed_rows", _fake)
