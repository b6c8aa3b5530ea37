"""Rows of a packed weight, as an embedding needs them: one opaque torch operator, `torch.ops.rac_modifier.packed_rows`.

The kernels' layout has panels of 16 rows, so that a lookup expands 16 rows to take one. That is little beside one layer of a
model, and no second copy of the weight is needed where the embedding is the output head, too.
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
    return torch.ops.rac_modifier.packed_rows(
        ids, packed[DATA], rows, columns, packed.get(SCALE), dtype
    )


def _packed_rows(
    ids: Tensor, data: Tensor, rows: int, columns: int, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    library, isa = library_and_isa()
    wanted, order = ids.flatten().sort()
    out = torch.empty(len(wanted), columns, dtype=dtype)
    if not len(wanted):
        return out.view(*ids.shape, columns)
    if int(wanted[0]) < 0 or int(wanted[-1]) >= rows:
        raise RacError(
            f"ids {int(wanted[0])} to {int(wanted[-1])}: the weight has rows 0 to {rows - 1}"
        )
    panels, counts = (wanted // PANEL).unique_consecutive(return_counts=True)
    lanes, first = wanted % PANEL, 0
    expanded = torch.empty(columns, PANEL)
    for panel, count in zip(panels.tolist(), counts.tolist(), strict=True):
        library.expand(data, rows, columns, panel, panel + 1, expanded, isa)
        if scale is not None:  # [groups, columns of a group, 16] times [groups, 1, 16]
            expanded.view(scale.shape[1], -1, PANEL).mul_(scale[panel].float()[:, None])
        these = slice(first, first + count)
        out[order[these]] = expanded[:, lanes[these]].t().to(dtype)
        first += count
    return out.view(*ids.shape, columns)


def _fake(
    ids: Tensor, data: Tensor, rows: int, columns: int, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return data.new_empty(*ids.shape, columns, dtype=dtype)


if not hasattr(
    torch.ops.rac_modifier, "packed_rows"
):  # once per process, also if this module is loaded again
    torch.library.define(
        "rac_modifier::packed_rows",
        "(Tensor ids, Tensor data, int rows, int columns, Tensor? scale, ScalarType dtype) -> Tensor",
    )
    torch.library.impl("rac_modifier::packed_rows", "cpu", _packed_rows)
    torch.library.register_fake("rac_modifier::packed_rows", _fake)
