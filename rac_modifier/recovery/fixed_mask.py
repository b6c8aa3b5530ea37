"""Zeros that stay zero with any trainer: hooks mask gradients, and weights after a step.

A gradient is masked as autograd computes it: before it is clipped (a pruned weight would
count in the norm) and before the optimizer reads it (Adam would keep moments for it).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from rac_modifier.errors import RacError
from rac_modifier.recovery.adapters import inside_adapters, mask_adapters


def sparse_masks(model: torch.nn.Module, least_sparsity: float = 0.05) -> dict[str, torch.Tensor]:
    """Return the masks of a sparse model: bool like the weight, True = kept, by parameter name.

    Only linear layers with at least `least_sparsity` zeros count. RacError if none is sparse, or
    they are quantized.
    """
    if masks := masks_of_zeros(model, least_sparsity):
        return masks
    name = type(model).__name__
    if any(getattr(m, "quantization_scheme", None) is not None for m in model.modules()):
        raise RacError(
            f"the linear layers of this {name} hold codes, which no trainer of weights can train; "
            "recover it with rac recover, or train it before it is quantized"
        )
    raise RacError(
        f"no linear layer of this {name} has {least_sparsity:.0%} of zeros or more, so there is no "
        "mask to hold; prune the model first, or load the pruned checkpoint"
    )


def masks_of_zeros(model: torch.nn.Module, least_sparsity: float) -> dict[str, torch.Tensor]:
    """Return what `sparse_masks` does, or nothing where no matrix is sparse."""
    masks, adapters = {}, inside_adapters(model)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_linear = isinstance(module, torch.nn.Linear) and module not in adapters
        if is_linear and isinstance(weight, torch.nn.Parameter):
            mask = weight.detach() != 0
            if float(mask.sum()) <= (1 - least_sparsity) * mask.numel():
                masks[f"{name}.weight"] = mask
    return masks


class FixedMask:
    """Hold the zeros of a model's parameters while an optimizer trains them, until `release`.

    `masks` are bool by parameter name, True = kept; default: `sparse_masks(model)`. RacError for a
    mask that fits no parameter, or a nonzero weight that its mask prunes.
    """

    def __init__(self, model: torch.nn.Module, masks: Mapping[str, torch.Tensor] | None = None):
        self.masks = dict(sparse_masks(model) if masks is None else masks)
        self._parameters = dict(model.named_parameters())
        for name, mask in self.masks.items():
            parameter = self._parameters.get(name)
            if parameter is None or parameter.shape != mask.shape:
                problem = "no such parameter" if parameter is None else "another shape"
                raise RacError(
                    f"mask of {name} {list(mask.shape)}: {problem}; use the masks of this "
                    "very model"
                )
            self.masks[name] = mask.to(parameter.device)
        self.check()
        self._hooks: list[Any] = [
            self._parameters[name].register_hook(partial(_masked, mask))
            for name, mask in self.masks.items()
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
        mask_adapters(model, {self._parameters[name]: mask for name, mask in self.masks.items()})

    @torch.no_grad()
    def apply(self) -> None:
        """Zero pruned weights, which an optimizer may move without a gradient (noise, momentum)."""
        for name, mask in self.masks.items():
            # as uint8: a CPU multiplies bool half as fast
            self._parameters[name].mul_(mask.view(torch.uint8))

    @torch.no_grad()
    def check(self) -> None:
        """Refuse weights outside the mask that are not zero (RacError)."""
        for name, mask in self.masks.items():
            moved = int((self._parameters[name].ne(0) & ~mask).sum())
            if moved:
                raise RacError(
                    f"{name}: {moved} weights outside the mask are not zero; train with "
                    "the mask of this model"
                )

    def release(self) -> None:
        """Stop holding the zeros."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


@contextlib.contextmanager
def fixed_mask(
    model: torch.nn.Module, masks: Mapping[str, torch.Tensor] | None = None
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


def _masked(mask: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient * mask.to(gradient.device).view(torch.uint8)
