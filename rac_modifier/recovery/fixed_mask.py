"""Zeros that stay zero in training, whoever trains: gradients are masked as they arrive, weights after each optimizer step.

A gradient has to be masked before it is clipped (a pruned weight's gradient would take part in the norm) and before the optimizer
sees it (Adam would keep moments for it). Both follow from masking it when autograd has computed it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from rac_modifier.errors import RacError
from rac_modifier.recovery.adapters import inside_adapters, mask_adapters


def sparse_masks(model: torch.nn.Module, least_sparsity: float = 0.05) -> dict[str, torch.Tensor]:
    """The masks of a model that is sparse already: bool like the weight, True = kept, by the weight's parameter name.

    Only matrices of linear layers with at least `least_sparsity` zeros count as pruned.

    Raises:
        RacError: no matrix is sparse, or the layers are quantized.
    """
    masks = masks_of_zeros(model, least_sparsity)
    if not masks and any(
        getattr(module, "quantization_scheme", None) is not None for module in model.modules()
    ):
        raise RacError(
            f"the linear layers of this {type(model).__name__} hold codes, which no trainer of weights can train; recover it "
            "with rac recover, which trains through the codes, or train it before it is quantized"
        )
    if not masks:
        raise RacError(
            f"no linear layer of this {type(model).__name__} has {least_sparsity:.0%} of zeros or more, so there is no mask to "
            "hold; prune the model first, or load the pruned checkpoint"
        )
    return masks


def masks_of_zeros(model: torch.nn.Module, least_sparsity: float) -> dict[str, torch.Tensor]:
    """As `sparse_masks`; empty where no matrix is sparse."""
    masks, adapters = {}, inside_adapters(model)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (
            not isinstance(module, torch.nn.Linear)
            or not isinstance(weight, torch.nn.Parameter)
            or module in adapters
        ):
            continue
        mask = weight.detach() != 0
        if float(mask.sum()) <= (1 - least_sparsity) * mask.numel():
            masks[f"{name}.weight"] = mask
    return masks


class FixedMask:
    """Holds the zeros of a model's parameters while any optimizer trains them; `release` ends it.

    Args:
        model: the sparse model; its parameters are watched, not copied.
        masks: bool by parameter name, True = kept; default: `sparse_masks(model)`.

    Raises:
        RacError: a mask that fits no parameter, or a weight that is not zero where its mask says so.
    """

    def __init__(self, model: torch.nn.Module, masks: Mapping[str, torch.Tensor] | None = None):
        self.masks = dict(sparse_masks(model) if masks is None else masks)
        self._parameters = dict(model.named_parameters())
        for name, mask in self.masks.items():
            parameter = self._parameters.get(name)
            if parameter is None or parameter.shape != mask.shape:
                found = (
                    "no such parameter"
                    if parameter is None
                    else f"its shape is {list(parameter.shape)}"
                )
                raise RacError(
                    f"mask of {name} {list(mask.shape)}: {found}; use the masks of this very model"
                )
            self.masks[name] = mask.to(parameter.device)
        self.check()
        self._hooks: list[Any] = [
            self._parameters[name].register_hook(_masked(mask))
            for name, mask in self.masks.items()
            if self._parameters[name].requires_grad
        ]
        self._hooks.append(register_optimizer_step_post_hook(lambda *_: self.apply()))
        self._mask_adapters(model)
        # Those that a trainer adds inside the context are found when the model is called. PEFT calls its forward without hooks.
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
        called: list[torch.nn.Module] = [model] if embeddings is None else [model, embeddings]
        self._hooks += [
            m.register_forward_pre_hook(lambda *_: self._mask_adapters(model)) for m in called
        ]

    def _mask_adapters(self, model: torch.nn.Module) -> None:
        mask_adapters(model, {self._parameters[name]: mask for name, mask in self.masks.items()})

    @torch.no_grad()
    def apply(self) -> None:
        """Set to zero what has to be zero: against an optimizer that moves weights without a gradient (noise, momentum)."""
        for name, mask in self.masks.items():
            self._parameters[name].mul_(
                mask.view(torch.uint8)
            )  # bool itself is multiplied half as fast on a CPU

    @torch.no_grad()
    def check(self) -> None:
        """Raise a RacError that names the first parameter with a nonzero value outside its mask."""
        for name, mask in self.masks.items():
            moved = int((self._parameters[name].ne(0) & ~mask).sum())
            if moved:
                raise RacError(
                    f"{name}: {moved} weights outside the mask are not zero; train with the mask of this model"
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
    """Inside this context the zeros of a sparse model stay zero, with any optimizer and any trainer (TRL, PEFT, your own).

        model = rac_modifier.load_model("out")
        with rac_modifier.fixed_mask(model):
            SFTTrainer(model=model, ...).train()

    LoRA adapters of PEFT are masked, too (adapters.py), also those that a trainer adds inside the context: what they add to a
    pruned weight is zero in training and when they are merged into this model. An adapter that is saved alone and loaded
    elsewhere is not: merge it, and save the model.

    Raises:
        RacError: see `FixedMask`; at the end, weights that were moved in a way that no hook sees.
    """
    held = FixedMask(model, masks)
    try:
        yield held
        held.check()
    finally:
        held.release()


def _masked(mask: torch.Tensor) -> Any:
    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * mask.to(gradient.device).view(torch.uint8)

    return hook
