"""LoRA adapters of PEFT on a sparse model: what they add to a pruned weight is left out, in training and at the merge.

A LoRA layer computes W x + s B A x. With the mask M of W (1 = kept) the product is

    (W + M o s B A) x  =  W x + s B A x - (not M o s B A) x

so the last term is taken off the layer's output, and M o s B A is what PEFT merges. It costs one more product with a matrix
of the size of W per layer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from rac_modifier.errors import RacError

_MASKED = "_rac_masked"


def inside_adapters(model: torch.nn.Module) -> set[torch.nn.Module]:
    """The modules that PEFT has added: their weights start at zero, and are no pruned ones."""
    own: set[torch.nn.Module] = set()
    for layer in _tuner_layers(model).values():
        base = set(layer.get_base_layer().modules())
        own.update(
            module for module in layer.modules() if module is not layer and module not in base
        )
    return own


def mask_adapters(model: torch.nn.Module, masks: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
    """Mask the adapters of `model` that are not masked yet; it lasts as long as they do, so that a later merge is masked too.

    Args:
        model: with or without adapters.
        masks: of the pruned weights, by parameter; True = kept.

    Raises:
        RacError: an adapter of a pruned weight that is no plain LoRA of a linear layer, or that has dropout.
    """
    for name, layer in _tuner_layers(model).items():
        weight: Any = getattr(layer.get_base_layer(), "weight", None)
        mask = None if weight is None else masks.get(weight)
        if mask is None or hasattr(layer, _MASKED):
            continue
        _check(name, layer)
        setattr(layer, _MASKED, _MaskedLora(layer, mask))


class _MaskedLora:
    """Changes one LoRA layer: its output, and what it merges."""

    def __init__(self, layer: Any, mask: torch.Tensor):
        self.mask, self._whole = mask, layer.get_delta_weight
        layer.get_delta_weight = self.delta
        layer.register_forward_hook(self.hook)

    def delta(self, adapter: str) -> torch.Tensor:
        """What an adapter adds to the weight [rows, columns], zero where it is pruned."""
        whole: torch.Tensor = self._whole(adapter)
        return whole * self.mask.to(whole.device)

    def hook(
        self, layer: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """The output without the part of pruned weights; a merged or disabled adapter adds nothing."""
        if layer.merged or layer.disable_adapters:
            return output
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                whole: torch.Tensor = self._whole(adapter)
                part = whole.masked_fill(self.mask.to(whole.device), 0.0)
                output = output - functional.linear(args[0].to(part.dtype), part).to(output.dtype)
        return output


def _tuner_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers of adapters by name. Where PEFT was not imported, there are none."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None:
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, peft.BaseTunerLayer)
    }


def _check(name: str, layer: Any) -> None:
    what = "train full parameters, or take a plain LoRA (LoraConfig without variants)"
    if (
        not hasattr(layer, "lora_A")
        or not isinstance(layer.get_base_layer(), torch.nn.Linear)
        or layer.fan_in_fan_out
    ):
        raise RacError(
            f"{name}: a {type(layer).__name__} adapter of a pruned weight would fill its zeros; {what}"
        )
    if layer.lora_variant:
        raise RacError(
            f"{name}: {', '.join(layer.lora_variant)} is a variant of LoRA, which would fill zeros; {what}"
        )
    if any(getattr(dropout, "p", 0.0) for dropout in layer.lora_dropout.values()):
        raise RacError(f"{name}: lora_dropout cannot be masked; set lora_dropout=0.0")
