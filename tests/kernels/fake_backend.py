"""A backend as a third one would be: three functions, and a layout of its own."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rac_modifier.formats.stored_weight import StoredWeight
from rac_modifier.kernels.interface import Decision, Layer


def can_run(layer: Layer) -> Decision:
    """Whatever is at most half stored."""
    sparse = layer.density <= 0.5
    reason = "a fake kernel" if sparse else "dense because it is more than half stored"
    return Decision(sparse, "fake" if sparse else "dense", reason, 1.0, 2.0)


def pack(weight: StoredWeight, served: torch.dtype) -> dict[str, Tensor]:
    """Two tensors of other names than those of the CPU's backend."""
    return {"fake_columns": weight.dequantized(served).T.contiguous(), "fake_flag": torch.ones(1)}


def linear(
    x: Tensor, packed: Mapping[str, Tensor], rows: int, columns: int, bias: Tensor | None = None
) -> Tensor:
    """A dense product."""
    assert packed["fake_columns"].shape == (columns, rows)
    assert packed["fake_flag"].item() == 1.0
    out = x @ packed["fake_columns"]
    return out if bias is None else out + bias
