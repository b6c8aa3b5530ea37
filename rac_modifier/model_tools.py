"""Small tools for a model as a whole: evaluation mode, the accelerator, and ending a forward pass early."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from loguru import logger
from transformers import PreTrainedModel


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Raised by a hook once it has seen all that it wants of a subgraph: the rest of this forward pass is not needed."""


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Models in evaluation mode, afterwards in the mode they were in."""
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
    """Sample on the accelerator even though oneshot loads the model on the CPU; back afterwards.

    A model that is placed already (device_map, offloading) stays where it is.
    """
    placed = hasattr(model, "hf_device_map") or any(p.device.type != "cpu" for p in model.parameters())
    if placed or not torch.accelerator.is_available():
        yield
        return
    device = torch.accelerator.current_accelerator()
    logger.info(f"moving the model to {device} to sample traces")
    model.to(device)  # type: ignore[arg-type]
    try:
        yield
    finally:
        model.to("cpu")  # type: ignore[arg-type]
