"""Enter llm-compressor's calibration, and leave it again.

`oneshot` initializes the recipe's modifiers, and runs a pipeline on a dataloader of its own. A
modifier cannot bring another. So the pipeline registered as "sequential" runs on our calibration
set from when a modifier is initialized until it is finalized or the pipeline fails. (A run that
fails elsewhere is finalized by the session's next reset, with which each `oneshot` begins.) Other
sessions always get upstream's pipeline.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.offload import set_onload_device
from compressed_tensors.utils import patch_attr
from llmcompressor.args import DatasetArguments
from llmcompressor.core import CompressionSession, active_session
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from loguru import logger
from transformers import PreTrainedModel

from rac_modifier.calibration.calibration_set import CalibrationSet
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor.checks import is_autoround
from rac_modifier.llmcompressor.forecast import Forecast
from rac_modifier.llmcompressor.loop import run_stages
from rac_modifier.llmcompressor.plan import make_plan
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.upstream import (
    contained_tracing,
    recorded_experts,
    use_sequential_pipeline,
    without_pinning,
)
from rac_modifier.runtime.models import main_device
from rac_modifier.runtime.progress import Phase
from rac_modifier.sampling.model_identity import model_fingerprint


@dataclass(frozen=True)
class SessionRun:
    """Hold our run in a session."""

    calibration: CalibrationSet
    loader: CalibrationLoader  # this rank's share of it
    run: Run | None = None  # None: our modifier prunes nothing
    reap: dict[str, dict[str, Any]] = field(default_factory=dict)  # of `recorded_experts`


_runs: weakref.WeakKeyDictionary[CompressionSession, SessionRun] = weakref.WeakKeyDictionary()


def install_pipeline(session: CompressionSession, run: SessionRun) -> None:
    """Calibrate this session on `run.loader` from now on."""
    _runs[session] = run
    use_sequential_pipeline(_pipeline_of_active_session)


def remove_pipeline(session: CompressionSession) -> bool:
    """Give this session upstream's pipeline again; return whether ours was in place."""
    ours = _runs.pop(session, None)
    if not _runs:
        use_sequential_pipeline(SequentialPipeline)
    return ours is not None


def _pipeline_of_active_session() -> SequentialPipeline:
    """Make a pipeline, as the registry calls it."""
    ours = _runs.get(active_session())
    return SequentialPipeline() if ours is None else ReasoningAwareSequentialPipeline(ours)


class ReasoningAwareSequentialPipeline(SequentialPipeline):
    """Run upstream's sequential pipeline on our calibration set; our modifier has its own loop."""

    def __init__(self, ours: SessionRun):
        self._ours = ours

    def __call__(  # type: ignore[override]
        self, model: PreTrainedModel, dataloader: object, dataset_args: DatasetArguments
    ) -> None:
        """Calibrate; an error takes our pipeline away."""
        try:
            with contained_tracing(model), Phase("calibrating"):
                self._calibrate(model, dataset_args)
        except BaseException:
            remove_pipeline(active_session())
            if self._ours.run is not None:
                self._ours.run.resume.leave()
            raise

    def _calibrate(self, model: PreTrainedModel, dataset_args: DatasetArguments) -> None:
        session, ours, run = active_session(), self._ours, self._ours.run
        modifiers = session.lifecycle.recipe.modifiers
        if run is not None and any(modifier is run.entry for modifier in modifiers):
            onload = main_device()
            offload = torch.device(dataset_args.sequential_offload_device)
            set_onload_device(model, onload)
            run.follow_names(model)
            sample = next(iter(ours.loader))
            plan = make_plan(model, sample, run.names, run.entry.order, dataset_args)
            stages, order, why = plan
            run.use_order(order, why)
            forecast = Forecast.of(run, model, ours.loader, by_layer=order == "layer")
            forecast.check(onload, offload, run.processes.local)
            about = {"order": order, "result of earlier modifiers": model_fingerprint(model)}
            run.go_on({**about, **ours.calibration.identity()})
            run_stages(model, ours.loader, stages, run, onload, offload)
            return
        loader = ours.loader.unpadded()
        if any(map(is_autoround, modifiers)):
            loader = ours.loader.joined()
            logger.info(
                f"AutoRound counts padding in its loss: {len(ours.loader.sequences):,} "
                f"sequences are joined to {len(loader):,} rows"
            )
        with (
            patch_attr(session.state.data, "calib", loader),
            recorded_experts(ours.reap),
            without_pinning(),
        ):
            SequentialPipeline.__call__(model, loader, dataset_args)
