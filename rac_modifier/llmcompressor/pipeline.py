"""The one place where we enter llm-compressor's calibration, and leave it again.

Upstream's `oneshot` initializes the recipe's modifiers, asks `CalibrationPipeline.from_modifiers` for a pipeline by name, and
calls it with the dataloader made from its own dataset arguments, which is None when the user gave none. A modifier has no way
to bring another. So, while a run of ours lasts, the pipeline registered as "sequential" is one that runs on our calibration
set: a modifier puts it in place when it is initialized, and it is taken away when the modifier is finalized or the pipeline
fails. (A run that fails elsewhere is finalized by the session's next reset, with which each `oneshot` begins.) Every other
session, in another thread for example, gets upstream's own pipeline all the time.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from compressed_tensors.offload import set_onload_device
from compressed_tensors.registry.registry import _REGISTRY
from llmcompressor.args import DatasetArguments
from llmcompressor.core import CompressionSession, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor.by_group import calibrate_by_group
from rac_modifier.llmcompressor.by_layer import calibrate_by_layer
from rac_modifier.llmcompressor.pruner import Pruner
from rac_modifier.llmcompressor.stages import Stage, UntraceableError, trace_stages
from rac_modifier.llmcompressor.targets import is_autoround

_NAME = "sequential"


@dataclass(frozen=True)
class Run:
    """A run of ours in a session: what is calibrated on, and the modifier that prunes; None where none does."""

    loader: CalibrationLoader
    pruner: Pruner | None


_runs: weakref.WeakKeyDictionary[CompressionSession, Run] = weakref.WeakKeyDictionary()


def put_in_place(session: CompressionSession, run: Run) -> None:
    """Calibrate this session on `run.loader` from now on."""
    _runs[session] = run
    _REGISTRY[CalibrationPipeline][_NAME] = _pipeline_of_active_session


def take_away(session: CompressionSession) -> bool:
    """Give this session upstream's pipeline again; returns whether ours was in place."""
    ours = _runs.pop(session, None)
    if not _runs:
        _REGISTRY[CalibrationPipeline][_NAME] = SequentialPipeline
    return ours is not None


def _pipeline_of_active_session() -> SequentialPipeline:
    """What the registry calls to make a pipeline."""
    run = _runs.get(active_session())
    return SequentialPipeline() if run is None else ReasoningAwareSequentialPipeline(run)


class ReasoningAwareSequentialPipeline(SequentialPipeline):
    """Upstream's sequential pipeline on our calibration set, in place of the dataloader that it is called with.

    It prunes group by group where the model can be traced that far and our pruning modifier is alone in this pass, else layer
    by layer. Other modifiers, which do not read token weights, run in upstream's own loop over unpadded batches.
    """

    def __init__(self, run: Run):
        self._run = run

    def __call__(  # type: ignore[override]
        self, model: PreTrainedModel, dataloader: object, dataset_args: DatasetArguments
    ) -> None:
        """Calibrate; on an error upstream's pipeline is in place again at once."""
        try:
            self._calibrate(model, dataset_args)
        except BaseException:
            take_away(active_session())
            raise

    def _calibrate(self, model: PreTrainedModel, dataset_args: DatasetArguments) -> None:
        session, run = active_session(), self._run
        modifiers = session.lifecycle.recipe.modifiers
        pruner = run.pruner if any(modifier is run.pruner for modifier in modifiers) else None
        if pruner is not None and len(modifiers) == 1:
            _prune(model, run.loader, dataset_args, session, pruner)
            return
        if pruner is not None:
            pruner.use_order(
                "layer", "other modifiers calibrate in the same pass (pipeline='sequential')"
            )
        with (
            _in_session(session, _without_padding(run.loader, modifiers)) as loader,
            _without_pinning(),
        ):
            SequentialPipeline.__call__(model, loader, dataset_args)


def _without_padding(loader: CalibrationLoader, modifiers: Iterable[Modifier]) -> CalibrationLoader:
    """One sequence per batch; for AutoRound, rows of equal length."""
    if not any(is_autoround(modifier) for modifier in modifiers):
        return loader.unpadded()
    joined = loader.joined()
    logger.info(
        f"AutoRound counts padding in its loss: {len(loader.sequences):,} sequences are joined to {len(joined):,} rows of "
        f"{len(joined.sequences[0].ids):,} tokens"
    )
    return joined


@contextlib.contextmanager
def _in_session(
    session: CompressionSession, loader: CalibrationLoader
) -> Iterator[CalibrationLoader]:
    """The loader whose token weights belong to the batches that are being run."""
    before, session.state.data.calib = session.state.data.calib, loader
    try:
        yield loader
    finally:
        session.state.data.calib = before


@contextlib.contextmanager
def _without_pinning() -> Iterator[None]:
    """AWQModifier pins activations for copies to a device; without a device torch refuses that, and there is nothing to copy."""
    pin = IntermediatesCache.pin_memory
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *args, **options: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin  # type: ignore[method-assign]


def _prune(
    model: PreTrainedModel,
    loader: CalibrationLoader,
    dataset_args: DatasetArguments,
    session: CompressionSession,
    pruner: Pruner,
) -> None:
    device, offload = get_main_device(), torch.device(dataset_args.sequential_offload_device)
    set_onload_device(model, device)
    stages: list[Stage] = []
    why = f"order: {pruner.order}"
    if dataset_args.sequential_targets:
        why = f"oneshot was given sequential_targets={dataset_args.sequential_targets}"
    elif dataset_args.sequential_targets_per_subgraph != 1:
        why = f"oneshot was given sequential_targets_per_subgraph={dataset_args.sequential_targets_per_subgraph}"
    elif pruner.order != "layer":
        try:
            stages = trace_stages(
                model, next(iter(loader)), pruner.calibrated_modules(), dataset_args.tracing_ignore
            )
        except UntraceableError as error:
            why = str(error)
    pruner.use_order("group" if stages else "layer", why)
    twice_before = pruner.check_memory(
        model, [group for stage in stages for group in stage.groups], device, offload
    )
    pruner.resume()
    if stages:
        calibrate_by_group(
            model, loader, stages, pruner, device, offload, twice_before=twice_before
        )
    else:
        calibrate_by_layer(model, loader, pruner, dataset_args, session, device)
