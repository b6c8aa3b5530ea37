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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

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
from torch.fx import _symbolic_trace
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor.forecast import Forecast, check_memory, groups_of
from rac_modifier.llmcompressor.loop import run_plan
from rac_modifier.llmcompressor.plan import make_plan
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.targets import is_autoround

_NAME = "sequential"


@dataclass(frozen=True)
class SessionRun:
    """Our run in a session.

    Attributes:
        loader: what every modifier is calibrated on.
        modifier: the one that prunes; None where none does.
        run: of that modifier.
        identity: of the calibration set, for a run that is resumed.
    """

    loader: CalibrationLoader
    modifier: Modifier | None = None
    run: Run | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


_runs: weakref.WeakKeyDictionary[CompressionSession, SessionRun] = weakref.WeakKeyDictionary()


def put_in_place(session: CompressionSession, run: SessionRun) -> None:
    """Calibrate this session on `run.loader` from here on."""
    _runs[session] = run
    _REGISTRY[CalibrationPipeline][_NAME] = _pipeline_of_active_session


def take_away(session: CompressionSession) -> bool:
    """Give this session upstream's pipeline again; returns whether ours was in place."""
    ours = _runs.pop(session, None)
    if not _runs:
        _REGISTRY[CalibrationPipeline][_NAME] = SequentialPipeline
    return ours is not None


def _pipeline_of_active_session() -> SequentialPipeline:
    """Make a pipeline, as the registry calls it."""
    run = _runs.get(active_session())
    return SequentialPipeline() if run is None else ReasoningAwareSequentialPipeline(run)


class ReasoningAwareSequentialPipeline(SequentialPipeline):
    """Upstream's sequential pipeline on our calibration set, instead of the dataloader that it is called with.

    Our pruning modifier runs in our own loop where it is alone in this pass. Other modifiers, which do not read token weights,
    run in upstream's loop over unpadded batches, and ours next to them prunes layer by layer there.
    """

    def __init__(self, run: SessionRun):
        self._run = run

    def __call__(  # type: ignore[override]
        self, model: PreTrainedModel, dataloader: object, dataset_args: DatasetArguments
    ) -> None:
        """Calibrate; on an error upstream's pipeline is in place again at once."""
        try:
            with _forgetting_wrapped_functions():
                self._calibrate(model, dataset_args)
        except BaseException:
            take_away(active_session())
            raise

    def _calibrate(self, model: PreTrainedModel, dataset_args: DatasetArguments) -> None:
        session, ours = active_session(), self._run
        modifiers = session.lifecycle.recipe.modifiers
        run = ours.run if any(modifier is ours.modifier for modifier in modifiers) else None
        if run is not None and len(modifiers) == 1:
            _prune(model, ours, run, dataset_args)
            return
        if run is not None:
            run.use_order(
                "layer", "other modifiers calibrate in the same pass (pipeline='sequential')"
            )
            run.by_hooks = True
        with (
            _in_session(session, _without_padding(ours.loader, modifiers)) as loader,
            _without_pinning(),
        ):
            SequentialPipeline.__call__(model, loader, dataset_args)


def _prune(
    model: PreTrainedModel, ours: SessionRun, run: Run, dataset_args: DatasetArguments
) -> None:
    """Plan the run, check its memory, and go through it in our own loop."""
    onload, offload = get_main_device(), torch.device(dataset_args.sequential_offload_device)
    set_onload_device(model, onload)
    plan = make_plan(model, next(iter(ours.loader)), run.names, run.entry.order, dataset_args)
    run.use_order(plan.order, plan.why)
    by_layer = plan.order == "layer"
    groups = groups_of(run.names, run.quantizer.grids, None if by_layer else plan.stages)
    count = run.processes.count
    forecast = Forecast.of(
        run.entry, model, groups, ours.loader, by_layer=by_layer, processes=count
    )
    recomputed = check_memory(forecast, onload, offload, processes=count)
    run.resume.begin({"order": plan.order, **ours.identity})
    run_plan(model, ours.loader, plan, run, onload, offload, recomputed)


@contextlib.contextmanager
def _forgetting_wrapped_functions() -> Iterator[None]:
    """Remove what upstream's tracer and subgraphs register with `torch.fx.wrap`: it holds the model for ever."""
    wrapped = _symbolic_trace._wrapped_fns_to_patch
    before = set(wrapped)
    try:
        yield
    finally:
        for key in wrapped.keys() - before:
            del wrapped[key]


def _without_padding(loader: CalibrationLoader, modifiers: Iterable[Modifier]) -> CalibrationLoader:
    """Return one sequence per batch; for AutoRound, rows of equal length."""
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
    """Make `loader` the one whose token weights belong to the batches that run."""
    before, session.state.data.calib = session.state.data.calib, loader
    try:
        yield loader
    finally:
        session.state.data.calib = before


@contextlib.contextmanager
def _without_pinning() -> Iterator[None]:
    """Let AWQModifier pin no activations where there is no device to copy them to: torch refuses that."""
    pin = IntermediatesCache.pin_memory
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *args, **options: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = pin  # type: ignore[method-assign]
