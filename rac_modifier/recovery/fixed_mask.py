"""Zeros that stay zero with any trainer: hooks mask gradients, and weights after a step.

A gradient is masked as autograd computes it: before it is clipped (a pruned weight would
count in the norm) and before the optimizer reads it (Adam would keep moments for it).

A LoRA layer of PEFT computes W x + s B A x. With the mask M of W (1 = kept) it has to compute

    (W + M o s B A) x  =  W x + s B A x - (not M o s B A) x

so a hook subtracts the last term from its output, at the cost of a matmul of the size of W, and
PEFT merges M o s B A.
"""

import contextlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from rac_modifier.errors import RacError

LEAST_ZEROS = 0.05  # share of zeros of a sparse layer; rounding makes a few


def sparse_masks(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return masks, True = kept, of layers and experts with `LEAST_ZEROS` (RacError: none)."""
    if masks := masks_of_zeros(model):
        return masks
    name = type(model).__name__
    if any(getattr(m, "quantization_scheme", None) is not None for m in model.modules()):
        raise RacError(
            f"the linear layers of this {name} hold codes, which no trainer of weights can train; "
            "recover it with rac recover, or train it before it is quantized"
        )
    raise RacError(
        f"no linear layer of this {name} has {LEAST_ZEROS:.0%} of zeros or more, so there is no "
        "mask to hold; prune the model first, or load the pruned checkpoint"
    )


def masks_of_zeros(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return what `sparse_masks` does, or nothing where no matrix is sparse."""
    masks, adapters = {}, _inside_adapters(model)
    for name, module in model.named_modules():
        if module in adapters:
            continue
        for part, weight in module.named_parameters(name, recurse=False):
            is_linear = isinstance(module, torch.nn.Linear) and part == f"{name}.weight"
            # [experts, rows, columns], as transformers keeps them
            merged_experts = name.endswith("experts") and weight.dim() == 3
            if is_linear or merged_experts:
                mask = weight.detach() != 0  # M
                if float(mask.sum()) <= (1 - LEAST_ZEROS) * mask.numel():
                    masks[part] = mask
    return masks


class FixedMask:
    """Hold the zeros of a model's parameters while an optimizer trains them, until `release`.

    `masks` are bool by parameter name, True = kept; default: `sparse_masks(model)`. RacError for a
    mask that fits no parameter, or a nonzero weight that its mask prunes.
    """

    def __init__(self, model: torch.nn.Module, masks: Mapping[str, Tensor] | None = None):
        self.masks = dict(sparse_masks(model) if masks is None else masks)
        self._parameters = dict(model.named_parameters())
        for name, mask in self.masks.items():
            parameter = self._parameters.get(name)
            if parameter is None or parameter.shape != mask.shape:
                problem = "no such parameter" if parameter is None else "another shape"
                raise RacError(f"mask of {name} {list(mask.shape)}: {problem}; use this model's")
        self.check()
        self._hooks: list[Any] = [
            self._parameters[name].register_hook(partial(self._masked, name))
            for name in self.masks
            if self._parameters[name].requires_grad
        ]
        self._hooks.append(register_optimizer_step_post_hook(lambda *_: self.apply()))
        self._mask_adapters(model)
        # Adapters that a trainer adds later are masked when the model is called. PEFT calls its
        # forward without hooks, so the embeddings have the hook too.
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
        called: list[torch.nn.Module] = [model] if embeddings is None else [model, embeddings]
        self._hooks += [
            m.register_forward_pre_hook(lambda *_: self._mask_adapters(model)) for m in called
        ]

    def _mask_adapters(self, model: torch.nn.Module) -> None:
        _mask_adapters(model, {self._parameters[name]: mask for name, mask in self.masks.items()})

    @torch.no_grad()
    def apply(self) -> None:
        """Zero pruned weights, which an optimizer may move without a gradient (noise, momentum)."""
        for _, parameter, mask in self._placed():
            # as uint8: a CPU multiplies bool half as fast
            parameter.mul_(mask.view(torch.uint8))

    @torch.no_grad()
    def check(self) -> None:
        """Refuse weights outside the mask that are not zero (RacError)."""
        for name, parameter, mask in self._placed():
            moved = int((parameter.ne(0) & ~mask).sum())
            if moved:
                raise RacError(
                    f"{name}: {moved} weights outside the mask are not zero; use this model's mask"
                )

    def _masked(self, name: str, gradient: Tensor) -> Tensor:
        return gradient * self.masks[name].to(gradient.device).view(torch.uint8)  # M o dL/dW

    def _placed(self) -> Iterator[tuple[str, torch.nn.Parameter, Tensor]]:
        """Yield each parameter with its mask, which follows it to another device."""
        for name, mask in self.masks.items():
            parameter = self._parameters[name]
            self.masks[name] = mask.to(parameter.device)
            yield name, parameter, self.masks[name]

    def release(self) -> None:
        """Stop holding the zeros."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


@contextlib.contextmanager
def fixed_mask(
    model: torch.nn.Module, masks: Mapping[str, Tensor] | None = None
) -> Iterator[FixedMask]:
    """Hold the zeros of a sparse model inside this context, with any optimizer and trainer.

        model = rac_modifier.load_model("out")
        with rac_modifier.fixed_mask(model):
            SFTTrainer(model=model, ...).train()

    LoRA adapters of PEFT are masked too, in training and when they are merged into this model. An
    adapter that is saved alone is not masked where it is loaded: merge it, and save the model.
    RacError as `FixedMask`, and for a pruned weight that was moved without the hooks.
    """
    held = FixedMask(model, masks)
    try:
        yield held
        held.check()
    finally:
        held.release()


_MASKED = "_rac_masked"


def _inside_adapters(model: torch.nn.Module) -> set[torch.nn.Module]:
    """Return the modules that PEFT added: their zeros are initial values, not pruned weights."""
    added: set[torch.nn.Module] = set()
    for layer in _tuner_layers(model).values():
        added |= set(layer.modules()) - set(layer.get_base_layer().modules()) - {layer}
    return added


def _mask_adapters(model: torch.nn.Module, masks: Mapping[torch.nn.Parameter, Tensor]) -> None:
    """Mask the adapters of `model`, also when they are merged (RacError: no plain LoRA)."""
    for name, layer in _tuner_layers(model).items():
        weight: Any = getattr(layer.get_base_layer(), "weight", None)
        mask = None if weight is None else masks.get(weight)
        if mask is not None and not hasattr(layer, _MASKED):
            _check(name, layer)
            _mask(layer, mask)


def _mask(layer: Any, mask: Tensor) -> None:
    """Subtract the part of pruned weights from the output of a LoRA layer, and at a merge."""
    unmasked = layer.get_delta_weight  # what an adapter adds to the weight, [rows, columns]

    def delta(adapter: str) -> Tensor:
        # M o s B A: what a merge adds
        weight: Tensor = unmasked(adapter)
        return weight * mask.to(weight.device)

    def hook(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if layer.merged or layer.disable_adapters:
            return output
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                # (not M o s B A) x, subtracted from what PEFT added
                weight: Tensor = unmasked(adapter)
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
            f"{name}: {why} fills its zeros; train full parameters, or plain LoRA (no variants)"
        )
    if any(getattr(dropout, "p", 0.0) for dropout in layer.lora_dropout.values()):
        raise RacError(f"{name}: lora_dropout cannot be masked; set lora_dropout=0.0")
