"""LoRA adapters of PEFT on a sparse model add nothing to a pruned weight.

A LoRA layer computes W x + s B A x. With the mask M of W (1 = kept) it has to compute

    (W + M o s B A) x  =  W x + s B A x - (not M o s B A) x

so a hook subtracts the last term from the layer's output, and PEFT merges M o s B A. It costs
another matmul of the size of W per layer.
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
    """Return the modules that PEFT added: their zeros are initial values, not pruned weights."""
    added: set[torch.nn.Module] = set()
    for layer in _tuner_layers(model).values():
        added |= set(layer.modules()) - set(layer.get_base_layer().modules()) - {layer}
    return added


def mask_adapters(model: torch.nn.Module, masks: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
    """Mask the adapters of `model`, if any, until they are removed; a later merge is masked too.

    `masks` are bool by pruned parameter, True = kept. RacError for an adapter of a pruned weight
    that is no plain LoRA of a linear layer, or has dropout.
    """
    for name, layer in _tuner_layers(model).items():
        weight: Any = getattr(layer.get_base_layer(), "weight", None)
        mask = None if weight is None else masks.get(weight)
        if mask is not None and not hasattr(layer, _MASKED):
            _check(name, layer)
            _mask(layer, mask)


def _mask(layer: Any, mask: torch.Tensor) -> None:
    """Subtract the part of pruned weights from the output of a LoRA layer, and at a merge."""
    unmasked = layer.get_delta_weight  # what an adapter adds to the weight, [rows, columns]

    def delta(adapter: str) -> torch.Tensor:
        weight: torch.Tensor = unmasked(adapter)
        return weight * mask.to(weight.device)

    def hook(layer: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if layer.merged or layer.disable_adapters:
            return output
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                weight: torch.Tensor = unmasked(adapter)
                part = weight.masked_fill(mask.to(weight.device), 0.0)
                output = output - functional.linear(args[0].to(part.dtype), part).to(output.dtype)
        return output

    layer.get_delta_weight = delta
    layer.register_forward_hook(hook)
    setattr(layer, _MASKED, True)


def _tuner_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Return the layers with adapters by name; none where PEFT was not imported."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    layers = model.named_modules() if peft is not None else ()
    return {name: layer for name, layer in layers if isinstance(layer, peft.BaseTunerLayer)}


def _check(name: str, layer: Any) -> None:
    why = ""
    is_linear = isinstance(layer.get_base_layer(), torch.nn.Linear)
    if not hasattr(layer, "lora_A") or not is_linear or layer.fan_in_fan_out:
        why = f"a {type(layer).__name__} adapter of a pruned weight"
    elif layer.lora_variant:
        why = f"{', '.join(layer.lora_variant)}, a variant of LoRA,"
    if why:
        raise RacError(
            f"{name}: {why} would fill its zeros; train full parameters, or take a plain LoRA "
            "(LoraConfig without variants)"
        )
    if any(getattr(dropout, "p", 0.0) for dropout in layer.lora_dropout.values()):
        raise RacError(f"{name}: lora_dropout cannot be masked; set lora_dropout=0.0")
