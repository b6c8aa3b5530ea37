"""Token weights by how much a token's output matters: squared gradients of a softened Fisher loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.errors import RacError

TEMPERATURE = 3.0  # flattens the model's near-certain predictions, whose gradients would nearly all be zero


def gradient_weights(
    model: PreTrainedModel, loader: CalibrationLoader, names: Mapping[torch.nn.Module, str], seed: int = 0
) -> dict[torch.nn.Module, list[torch.Tensor]]:
    """One weight a token for each module of `names`: ||dL / dy||^2 of its output y, scaled to a mean of 1.

    L is the cross entropy of softmax(logits / 3) at next tokens drawn from that very distribution, so that the expected
    squared gradient is the Fisher information of what the dense model predicts (weighted reconstruction then follows the
    second-order loss of the output, as in optimal brain surgeon, with each token's output covariance reduced to a scale).
    One forward and one backward pass of the dense model, about three forward passes; the activations of one batch are held.

    Returns:
        float32 [rows, length] for each batch of the loader, times the loader's own token weights.

    Raises:
        RacError: naming a module that no gradient reaches.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[torch.nn.Module, list[torch.Tensor]] = {module: [] for module in names}
    hooks = [module.register_forward_hook(_remember(found[module])) for module in names]
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    entrance = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    device = model.get_input_embeddings().weight.device
    try:
        with torch.enable_grad():
            for batch, own in zip(tqdm(loader, desc="token weights", unit="batch"), loader.token_weights, strict=True):
                logits = model(input_ids=batch["input_ids"].to(device), use_cache=False).logits.float() / TEMPERATURE
                counted = (own > 0).to(logits.device)
                logits = logits[counted]
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).to(logits.device)
                torch.nn.functional.cross_entropy(logits, drawn.squeeze(1), reduction="sum").backward()
    finally:
        for hook in [*hooks, entrance]:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return {module: _scaled(names[module], weights, loader) for module, weights in found.items()}


def _remember(squares: list[torch.Tensor]):  # type: ignore[no-untyped-def]
    def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: squares.append(gradient.float().square().sum(-1).cpu()))

    return hook


def _scaled(name: str, weights: list[torch.Tensor], loader: CalibrationLoader) -> list[torch.Tensor]:
    if len(weights) != len(loader):
        raise RacError(
            f"{name} got {len(weights)} gradients for {len(loader)} batches, so its tokens cannot be weighed: "
            "add it to ignore, or leave experimental.token_weights out"
        )
    weighted = [w * own for w, own in zip(weights, loader.token_weights, strict=True)]
    total = sum(float(w.sum(dtype=torch.float64)) for w in weighted)
    own_total = sum(float(own.sum(dtype=torch.float64)) for own in loader.token_weights)
    if not 0 < total < float("inf"):
        raise RacError(f"{name}: the squared gradients sum to {total}; leave experimental.token_weights out")
    return [w * (own_total / total) for w in weighted]
