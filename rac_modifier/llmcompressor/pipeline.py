"""The one place where RAC enters llm-compressor's calibration pipelines.

Upstream's `oneshot` hands its pipelines the dataloader that it built from its own dataset arguments, which is None when
the user gave none. A modifier can put another into `session.state.data.calib`, but nothing reads it there. So the
pipelines registered as "sequential" and "basic" are replaced by the subclasses below. Without a `CalibrationLoader` in the
session they are upstream's own, call for call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from compressed_tensors.offload import set_onload_device
from compressed_tensors.registry.registry import _REGISTRY
from llmcompressor.core import active_session
from llmcompressor.pipelines.basic.pipeline import BasicPipeline
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from llmcompressor.utils.dev import get_main_device
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.by_group import calibrate_by_group
from rac_modifier.llmcompressor.by_layer import calibrate_by_layer
from rac_modifier.llmcompressor.stages import Stage, UntraceableError, trace_stages


class ReasoningAwareSequentialPipeline(SequentialPipeline):
    """Upstream's sequential pipeline, fed with the loader that RAC put into the session."""

    @staticmethod
    def __call__(model: PreTrainedModel, dataloader: Any, dataset_args: Any) -> None:  # type: ignore[override]
        """Calibrate group by group where the model can be traced that far and RAC is alone in this pass, else layer by layer.

        A modifier that knows nothing of token weights gets upstream's own loop, over unpadded batches.
        """
        session = active_session()
        loader = session.state.data.calib
        modifiers = session.lifecycle.recipe.modifiers
        ours = [m for m in modifiers if hasattr(m, "use_order")]
        if not isinstance(loader, CalibrationLoader):
            SequentialPipeline.__call__(model, dataloader, dataset_args)
        elif len(ours) == len(modifiers) == 1:
            _calibrate(model, loader, dataset_args, session, ours[0])
        else:
            for modifier in ours:
                modifier.use_order("layer", "other modifiers calibrate in the same pass (pipeline='sequential')")
            with _in_session(session, loader.unpadded()) as unpadded:
                SequentialPipeline.__call__(model, unpadded, dataset_args)


class ReasoningAwareBasicPipeline(BasicPipeline):
    """Upstream's basic pipeline; RAC refuses it, since it would prune every layer on the dense model's activations."""

    @staticmethod
    def __call__(model: torch.nn.Module, dataloader: Any, dataset_args: Any) -> None:
        """Run upstream's pipeline, or refuse when RAC's loader is in the session."""
        if isinstance(active_session().state.data.calib, CalibrationLoader):
            raise RacError('pipeline="basic" does not prune layer by layer; use pipeline="independent" or "sequential"')
        BasicPipeline.__call__(model, dataloader, dataset_args)


def install() -> None:
    """Put both pipelines in their registry places; does nothing the second time."""
    _REGISTRY[CalibrationPipeline]["sequential"] = ReasoningAwareSequentialPipeline
    _REGISTRY[CalibrationPipeline]["basic"] = ReasoningAwareBasicPipeline


@contextlib.contextmanager
def _in_session(session: Any, loader: CalibrationLoader) -> Iterator[CalibrationLoader]:
    """The loader whose token weights belong to the batches that are being run."""
    before, session.state.data.calib = session.state.data.calib, loader
    try:
        yield loader
    finally:
        session.state.data.calib = before


def _calibrate(
    model: PreTrainedModel, loader: CalibrationLoader, dataset_args: Any, session: Any, modifier: Any
) -> None:
    device = get_main_device()
    set_onload_device(model, device)
    stages: list[Stage] = []
    why = f"order: {modifier.order}"
    if dataset_args.sequential_targets:
        why = f"oneshot was given sequential_targets={dataset_args.sequential_targets}"
    elif modifier.order != "layer":
        try:
            stages = trace_stages(model, next(iter(loader)), modifier.calibrated_modules(), dataset_args.tracing_ignore)
        except UntraceableError as error:
            why = str(error)
    modifier.use_order("group" if stages else "layer", why)
    if stages:
        offload = torch.device(dataset_args.sequential_offload_device)
        calibrate_by_group(model, loader, stages, modifier, device, offload)
    else:
        calibrate_by_layer(model, loader, dataset_args, session, device)


install()  # here and not in modifier/, so that whichever of the two is imported first, both are complete
