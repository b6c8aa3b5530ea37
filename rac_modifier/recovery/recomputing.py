"""Recompute activations in the backward pass; only the inputs of each decoder layer are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rac_modifier.errors import RacError


def decoder_layers(model: torch.nn.Module, setting: str) -> list[torch.nn.Module]:
    """Return the decoder layers of a transformers model.

    Raises:
        RacError: transformers marks none; `setting` needs them.
    """
    layers: list[torch.nn.Module] = [
        m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)
    ]
    if not layers:
        raise RacError(
            f"{type(model).__name__} has no layers that transformers can run one by one; leave "
            f"{setting} out"
        )
    return layers


@contextlib.contextmanager
def recomputing(model: torch.nn.Module, enabled: bool = True) -> Iterator[None]:
    """Run each layer's forward pass again in the backward pass inside this context, with the same bits.

    transformers' own switch works in training mode alone, in which dropout is on.

    Raises:
        RacError: a model without such layers.
    """
    layers = decoder_layers(model, "recover.activation_checkpointing") if enabled else []
    for layer in layers:
        layer.forward = _twice(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the method of its class is found again


def _twice(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
