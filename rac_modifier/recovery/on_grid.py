"""Training through the codes of a quantized weight: the forward pass uses the weight that will be stored.

With a float32 master weight w, a scale s of either sign per row or group, and codes
c = round(clamp(w / s)), the forward pass uses c s, and gradients pass straight through:

    dL/dw = dL/d(c s)                  where w / s is not clamped, else 0
    dL/ds = sum dL/d(c s) (c - w / s)  where it is not clamped, else dL/d(c s) c

(LSQ, arXiv 1902.08153)

A pruned weight is 0, so its code is 0 whatever its scale is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils import parametrize

from rac_modifier.quantization.grid import Grid, stored


@dataclass(frozen=True)
class QuantizedWeight:
    """How a module's weight is quantized.

    Attributes:
        scale: [rows, groups], in the dtype that is stored.
        master: the weight that training starts from, with the same codes and zeros (cells.py); None:
            code times scale.
        zero: zero points [rows, groups] of an asymmetric grid, which are not trained.
    """

    grid: Grid
    scale: torch.Tensor
    master: torch.Tensor | None = None
    zero: torch.Tensor | None = None


class OnGrid(torch.nn.Module):
    """Parametrize a weight [rows, columns] by a master weight and a relative change of its scales."""

    def __init__(self, quantized: QuantizedWeight):
        super().__init__()
        self.grid, self.dtype = quantized.grid, quantized.scale.dtype
        self.start: torch.Tensor
        self.register_buffer("start", quantized.scale.detach().float())
        self.zero: torch.Tensor | None
        self.register_buffer(
            "zero", None if quantized.zero is None else quantized.zero.detach().float()
        )
        self.log_change = torch.nn.Parameter(torch.zeros_like(self.start))

    def scale(self) -> torch.Tensor:
        """Return the scales [rows, groups] as they would be stored; gradients pass the rounding."""
        exact = self.start * self.log_change.exp()
        return exact + (stored(exact.detach(), self.dtype) - exact).detach()

    def forward(self, master: torch.Tensor) -> torch.Tensor:
        """Return code times scale."""
        zero = None if self.zero is None else self._spread(self.zero, master)
        return _CodeTimesScale.apply(master, self._spread(self.scale(), master), zero, self.grid)

    def _spread(self, part: torch.Tensor, master: torch.Tensor) -> torch.Tensor:
        return part.repeat_interleave(self.grid.group_size or master.shape[1], dim=1)[
            :, : master.shape[1]
        ]


class _CodeTimesScale(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, master: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, grid: Grid
    ) -> torch.Tensor:
        scaled = master / scale
        codes = grid.codes_(scaled.clone(), zero)
        lowest, highest = grid.codes_(scaled.new_tensor([-torch.inf, torch.inf]))
        if zero is not None:
            lowest, highest = lowest - zero, highest - zero
        clamped = (scaled < lowest) | (scaled > highest)
        ctx.save_for_backward(scaled, codes, clamped)
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        scaled, codes, clamped = ctx.saved_tensors
        for_scale = outer[0] * torch.where(clamped, codes, codes - scaled)
        return outer[0].masked_fill(clamped, 0.0), for_scale, None, None


@contextlib.contextmanager
def on_grid(model: torch.nn.Module, quantized: Mapping[str, QuantizedWeight]) -> Iterator[None]:
    """Train the weights of these modules through their codes and scales inside this context.

    Fake quantization of compressed-tensors is off meanwhile. Afterwards `weight` holds code times scale,
    and `weight_scale`, if the module has one, the scales.
    """
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in quantized}
    enabled: dict[Any, Any] = {
        module: module.quantization_enabled
        for module in model.modules()
        if hasattr(module, "quantization_enabled")
    }
    for module in enabled:
        module.quantization_enabled = False
    for name, module in modules.items():
        parametrize.register_parametrization(
            module, "weight", OnGrid(quantized[name]).to(module.weight.device)
        )
    try:
        yield
    finally:
        for module in modules.values():
            form = module.parametrizations.weight[0]
            scale = form.scale().detach().to(form.dtype)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            if hasattr(module, "weight_scale"):
                module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        for module, value in enabled.items():
            module.quantization_enabled = value
