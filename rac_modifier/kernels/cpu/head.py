"""A head of int8 codes in two planes of 4 bits; the low plane is read for likely tokens alone.

A code is c = 16 h + 8 + v, h in [-8, 7] and v in [-8, 7]. For inputs x and a scale s per row:

    logit = 16 s h x + 8 s sum(x) + s v x

The first two terms read half of the bytes. The third is added in the panels of 16 rows that hold
the highest logits of a token; any other row is as far off as a head of 4 bits.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rac_modifier.formats.stored_weight import StoredWeight
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu import operator
from rac_modifier.kernels.cpu.library import PANEL
from rac_modifier.kernels.cpu.support import library_and_isa
from rac_modifier.kernels.interface import Decision, Layer

LOW, LOW_SCALE = "weight_packed_low", "weight_packed_low_scale"
PANELS = 32  # per token that get the low plane; results/log.md has the KL with 16 and 64
_TOKENS = 64  # whose logits are in float32 at a time


def can_split(layer: Layer) -> bool:
    """Return whether the weight is dense int8 with a scale per row."""
    encoding = layer.encoding
    is_int8 = (encoding.kind, encoding.bits, encoding.symmetric) == ("int", 8, True)
    return is_int8 and layer.density == 1.0 and layer.group == layer.columns


def can_run(layer: Layer) -> Decision:
    """Decide as for one plane: the weight takes as many bytes."""
    decision = cpu.can_run(layer)
    if not decision.sparse:
        return decision
    planes = f"{decision.kernel} in two planes of 4 bits"
    reason = decision.reason.replace(decision.kernel, planes, 1)
    return replace(decision, kernel=planes, reason=reason)


def pack(weight: StoredWeight, served: torch.dtype) -> dict[str, Tensor]:
    """Return the planes and their scales, by the names of the parameters."""
    codes, scale = weight.values, weight.scale
    assert scale is not None
    high = codes >> 4  # floor(c / 16)
    low = codes - (high << 4) - 8
    plane = replace(weight, bits=4, activation_bits=16)
    packed = cpu.pack(replace(plane, values=high, scale=16 * scale), served)
    of_low = cpu.pack(replace(plane, values=low), served)
    return packed | {LOW: of_low[cpu.DATA], LOW_SCALE: of_low[cpu.SCALE].float()}


def linear(
    x: Tensor, packed: Mapping[str, Tensor], rows: int, columns: int, bias: Tensor | None = None
) -> Tensor:
    """Return the logits of x [..., columns], [..., rows] in the dtype of x."""
    bias = None if bias is None else bias.float()
    parts = [
        _logits(part.float(), packed, rows, columns, bias).to(x.dtype)
        for part in x.reshape(-1, columns).split(_TOKENS)
    ]
    logits = parts[0] if len(parts) == 1 else torch.cat(parts)
    return logits.view(*x.shape[:-1], rows)


def _logits(
    x: Tensor, packed: Mapping[str, Tensor], rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    """Return float32 logits [M, rows] of x [M, columns] in float32."""
    scale = packed[LOW_SCALE]  # [panels, 1, 16]
    out = operator.sparse_linear(x, packed[cpu.DATA], rows, columns, bias, packed[cpu.SCALE])
    out.addmm_(8 * x.sum(dim=1, keepdim=True), scale.view(1, -1)[:, :rows])
    whole = rows // PANEL * PANEL
    highest = out[:, :whole].unflatten(1, (-1, PANEL)).amax(dim=2)
    if whole < rows:
        highest = torch.cat([highest, out[:, whole:].amax(dim=1, keepdim=True)], dim=1)
    panels = highest.topk(min(PANELS, highest.shape[1]), dim=1).indices
    library, isa = library_and_isa()
    library.add_panels(packed[LOW], x.contiguous(), panels, scale, out, isa)
    return out
