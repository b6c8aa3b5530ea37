"""The one place where RAC enters llm-compressor's calibration pipelines.

Upstream's `oneshot` hands its pipelines the dataloader that it built from its own dataset arguments, which is None when
the user gave none. A modifier can put another into `session.state.data.calib`, but nothing reads it there. So the
pipelines registered as "sequential" and "basic" are replaced by the subclasses below. Without a `CalibrationLoader` in the
session they are upstream's own, call for call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from compressed_tensors.offload import disable_offloading, set_onload_device
from compressed_tensors.registry.registry import _REGISTRY
from llmcompressor.core import LifecycleCallbacks, active_session
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.basic.pipeline import BasicPipeline
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from llmcompressor.utils.dev import get_main_device
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from tqdm import tqdm
from transformers import PreTrainedModel

from rac_modifier.calibration.batches import CalibrationLoader
from rac_modifier.calibration.stop import StopForward
from rac_modifier.errors import RacError


class ReasoningAwareSequentialPipeline(SequentialPipeline):
    """Upstream's sequential pipeline, fed with the loader that RAC put into the session."""

    @staticmethod
    def __call__(model: PreTrainedModel, dataloader: Any, dataset_args: Any) -> None:  # type: ignore[override]
        """Calibrate layer by layer.

        When every modifier of this pass can stop a forward early (`stops_forward`), the pass is the lean one below;
        any other modifier gets upstream's own loop over unpadded batches.
        """
        session = active_session()
        loader = session.state.data.calib
        if not isinstance(loader, CalibrationLoader):
            SequentialPipeline.__call__(model, dataloader, dataset_args)
        elif all(getattr(m, "stops_forward", False) for m in session.lifecycle.recipe.modifiers):
            _calibrate(model, loader, dataset_args, session)
        else:
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


def _calibrate(model: PreTrainedModel, loader: CalibrationLoader, dataset_args: Any, session: Any) -> None:
    """Upstream's loop without the work whose result nobody reads.

    A subgraph's first pass ends at its last calibrated module (whose output the Hessians do not need), the last calibrated
    subgraph is not run a second time, and what comes after it is not run at all.
    """
    onload_device = get_main_device()
    set_onload_device(model, onload_device)
    subgraphs = trace_subgraphs(
        model,
        next(iter(loader)),
        infer_sequential_targets(model, dataset_args.sequential_targets),  # type: ignore[arg-type]
        dataset_args.tracing_ignore,
        dataset_args.sequential_targets_per_subgraph,
    )
    LifecycleCallbacks.calibration_start()
    wanted = {module for m in session.lifecycle.recipe.modifiers for module in m.calibrated_modules()}
    submodules = [subgraph.submodules(model) for subgraph in subgraphs]
    last = max((i for i, modules in enumerate(submodules) if wanted.intersection(modules)), default=-1)

    with contextlib.ExitStack() as stack:
        stack.enter_context(calibration_forward_context(model))
        stack.enter_context(DisableQuantization(model))
        cache = IntermediatesCache.from_dataloader(
            loader, onload_device, torch.device(dataset_args.sequential_offload_device)
        )

        def batches(index: int, what: str) -> Iterable[tuple[int, dict[str, Any]]]:
            description = f"({index + 1}/{last + 1}): {what}"
            return tqdm(enumerate(cache.iter(subgraphs[index].input_names)), total=len(loader), desc=description)

        for index, subgraph in enumerate(subgraphs[: last + 1]):
            with disable_offloading():
                if wanted.intersection(submodules[index]):
                    for modifier in session.lifecycle.recipe.modifiers:
                        modifier.on_subgraph_start(submodules[index])
                    for batch, inputs in batches(index, "Calibrating"):
                        session.state.current_batch_idx = batch
                        with contextlib.suppress(StopForward):
                            subgraph.forward(model, **inputs)
                    LifecycleCallbacks.sequential_epoch_end(submodules[index])
                if index < last:
                    with HooksMixin.disable_hooks():
                        for batch, inputs in batches(index, "Propagating"):
                            cache.update(batch, subgraph.forward(model, **inputs))
                            cache.delete(batch, subgraph.consumed_names)
        LifecycleCallbacks.calibration_end()


install()  # here and not in modifier.py, so that whichever of the two is imported first, both are complete
