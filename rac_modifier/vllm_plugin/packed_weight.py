"""A layer's weight in the layout of a kernel backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from rac_modifier.checkpoint.stored_weight import StoredWeight
from rac_modifier.kernels.interface import Backend


class PackedWeight:
    """Packs a weight for `backend` into parameters of `layer`, where memory accounting and torch.compile find them.

    `served` is the dtype of the activations.
    """

    def __init__(
        self, layer: torch.nn.Module, backend: Backend, weight: StoredWeight, served: torch.dtype
    ) -> None:
        self.rows, self.columns = weight.rows, weight.columns
        packed = backend.pack(weight, served)
        self.names = tuple(packed)
        for name, tensor in packed.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        self.backend = backend

    def linear(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., K] to [..., N]. Reads the parameters of the layer, since vLLM may have replaced them."""
        packed = {name: getattr(layer, name) for name in self.names}
        return self.backend.linear(x, packed, self.rows, self.columns, bias)
