"""How much a token counts in a Hessian: a factor for each trace as a whole, and a weight for each token by its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.errors import RacError
from rac_modifier.traces.records import Trace

Weighting = Callable[[Trace], float]

TEMPERATURE = 3.0  # flattens nearly certain predictions, whose gradients would otherwise be almost zero


def find_weighting(weighting: str | Weighting, is_right: Callable[[Trace], bool]) -> Weighting | None:
    """The function that gives each trace its factor; None where the factor is 1 for all.

    Args:
        weighting: "uniform", "inverse_length" or "correct", or a function of a `Trace` that returns a number of at least 0.
        is_right: whether a trace's answer is right; called for "correct" only.

    Raises:
        RacError: another name; from the function that is returned: a weight that is negative or no finite number.
    """
    if callable(weighting):
        return lambda trace: _checked(weighting(trace), weighting, trace)
    if weighting == "uniform":
        return None
    if weighting == "inverse_length":
        return lambda trace: 1 / trace.tokens
    if weighting == "correct":
        return lambda trace: float(is_right(trace))
    raise RacError(
        f"trace_weighting is {weighting!r}; use uniform, inverse_length or correct, or from Python a function of a trace"
    )


def _checked(weight: object, weighting: Weighting, trace: Trace) -> float:
    if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
        name = getattr(weighting, "__qualname__", repr(weighting))
        raise RacError(
            f"trace_weighting {name} gives trace {trace.id!r} the weight {weight!r}; return a number of at least 0"
        )
    return float(weight)


def mean_one_factor(weights: list[tuple[float, int]]) -> float:
    """The factor that gives (weight, tokens) pairs a mean of 1 per token, so that traces keep their share beside other parts.

    Raises:
        RacError: all weights are 0.
    """
    total = sum(weight * tokens for weight, tokens in weights)
    if total == 0:
        raise RacError("every trace of the calibration set weighs 0, so none would count; set another trace_weighting")
    return sum(tokens for _, tokens in weights) / total


def gradient_weights(
    model: PreTrainedModel, loader: CalibrationLoader, names: Mapping[torch.nn.Module, str], seed: int = 0
) -> dict[torch.nn.Module, list[torch.Tensor]]:
    """One weight per token for each module of `names`: ||dL / dy||^2 of its output y, scaled to a mean of 1.

    L is the cross entropy of softmax(logits / 3) with next tokens drawn from the same distribution, so that the expected
    squared gradient is the Fisher information of the dense model's predictions. Weighted reconstruction then approximates the
    second-order loss of the output, as in optimal brain surgeon, with each token's output covariance reduced to a scale.
    It costs one forward and one backward pass of the dense model, about three forward passes. Rows are taken one by one: the
    logits of a whole batch and their gradients would need tens of gigabytes with a vocabulary of 50,000.

    Args:
        model: the dense model, with all weights on one device.
        loader: the calibration set.
        names: the modules to weigh tokens for, with the names for messages.
        seed: of the drawn tokens.

    Returns:
        float32 [rows, length] for each batch of the loader, multiplied with the loader's own token weights.

    Raises:
        RacError: no gradient reaches a module; the message has its name.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[torch.nn.Module, list[torch.Tensor]] = {module: [] for module in names}
    of_batch: dict[torch.nn.Module, list[torch.Tensor]] = {module: [] for module in names}  # a tensor per row
    hooks = [module.register_forward_hook(_remember(of_batch[module])) for module in names]
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    entrance = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    device = model.get_input_embeddings().weight.device
    try:
        with torch.enable_grad():
            for batch, own in zip(
                tqdm(loader, desc="token weights", unit="batch", disable=None), loader.token_weights, strict=True
            ):
                for ids, counted in zip(batch["input_ids"].to(device), own > 0, strict=True):
                    logits = (
                        model(input_ids=ids[None], use_cache=False).logits[0][counted.to(device)].float() / TEMPERATURE
                    )
                    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
                    torch.nn.functional.cross_entropy(
                        logits, drawn.squeeze(1).to(logits.device), reduction="sum"
                    ).backward()
                for module, rows in of_batch.items():
                    if len(rows) == len(own):
                        found[module].append(torch.cat(rows))
                    rows.clear()
    finally:
        for hook in [*hooks, entrance]:
            hook.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return {module: _scaled(names[module], weights, loader) for module, weights in found.items()}


def _remember(squares: list[torch.Tensor]) -> Callable[[torch.nn.Module, tuple[Any, ...], torch.Tensor], None]:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
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
