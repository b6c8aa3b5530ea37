"""Small tools for a model as a whole: evaluation mode, the accelerator, and the early end of a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from loguru import logger
from transformers import PreTrainedModel


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Raised by a hook that has all the activations it needs, to skip the rest of this forward pass."""


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Put models into evaluation mode, and afterwards back into the mode that each was in."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


@contextlib.contextmanager
def on_accelerator(model: PreTrainedModel) -> Iterator[None]:
    """Move a model that is on the CPU, where oneshot loads it, to the accelerator, and afterwards back.

    A model that is placed already (device_map, offloading) is not moved.
    """
    placed = hasattr(model, "hf_device_map") or any(p.device.type != "cpu" for p in model.parameters())
    if placed or not torch.accelerator.is_available():
        yield
        return
    device = torch.accelerator.current_accelerator()
    logger.info(f"moving the model to {device}")
    model.to(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        model.to("cpu")  # type: ignore[arg-type]
