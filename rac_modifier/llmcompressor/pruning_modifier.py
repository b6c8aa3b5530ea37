"""Calibrate, prune and quantize in one recipe entry."""

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import remove_dispatch
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import PrivateAttr
from transformers import PreTrainedModel

from rac_modifier.checkpoint.output_folder import unfinished
from rac_modifier.checkpoint.saving import SavePlan, save_with_record
from rac_modifier.distributed.machines import environment
from rac_modifier.errors import RacError
from rac_modifier.evaluation.activations import choose_in_run
from rac_modifier.llmcompressor.calibration_modifier import CalibratingModifier
from rac_modifier.llmcompressor.checks import check_other_modifiers, check_packing
from rac_modifier.llmcompressor.experts import check_experts, find_experts
from rac_modifier.llmcompressor.forecast import Forecast
from rac_modifier.llmcompressor.quantizer import Quantizer
from rac_modifier.llmcompressor.resume import Resume, check_disk
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.targets import find_targets, patterns_of
from rac_modifier.recovery.stage import RecoveryStage
from rac_modifier.runtime.models import main_device
from rac_modifier.sampling.model_identity import model_fingerprint
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pruning import EXPERT_FLOOR


class ReasoningAwareSparseGPTModifier(PruningEntry, CalibratingModifier):
    """Prune in llm-compressor; `PruningEntry` has the settings."""

    requires_calibration_data: bool = True

    _run: Run | None = PrivateAttr(default=None)
    _described: str = PrivateAttr(default="")  # the patterns in words
    _recovery: RecoveryStage | None = PrivateAttr(default=None)
    _recovered: dict[str, Any] = PrivateAttr(default_factory=dict)  # the run record's entry
    _activations: dict[str, Any] | None = PrivateAttr(default=None)  # of `choose_in_run`

    @property
    def run(self) -> Run:
        """Return the run, once the modifier is initialized."""
        assert self._run is not None
        return self._run

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check all that can be checked, then build the calibration set."""
        self.check_run(state, prunes=True)
        oneshot, quantizes = self._oneshot, self.quantization is not None
        shared = oneshot and str(oneshot.dataset_args.pipeline).lower() != "independent"
        if oneshot and shared and self.other_modifiers():
            raise RacError(
                f"pipeline={oneshot.dataset_args.pipeline!r} runs all modifiers in one "
                "pass, and pruning needs its own; use pipeline='independent'"
            )
        check_other_modifiers(self, active_session().lifecycle.recipe.modifiers)
        run = self._run = self._make_run(state.model)
        try:
            loader = self._calibration.loader if self._calibration else None  # None: to be sampled
            offload = oneshot.dataset_args.sequential_offload_device if oneshot else "cpu"
            forecast = Forecast.of(run, state.model, loader, by_layer=self.order == "layer")
            forecast.check(main_device(), torch.device(offload), self._processes.local)
            if self.recover is not None:
                keep = oneshot is not None and oneshot.output_dir is not None
                self._recovery = RecoveryStage(
                    state.model, self.recover, self._processes, quantizes=quantizes, keep=keep
                )
            self.prepare(state)
            if self._recovery is not None:
                self._recovery.read_dense(state.model, self.calibration_set.reserved)
            run.quantizer.attach(state.model)
            save_with_record(state.model, self._save_plan)
            self.calibrate_session(state, run)
        except BaseException:
            run.resume.leave()
            raise
        return True

    def _make_run(self, model: PreTrainedModel) -> Run:
        """Resolve targets, patterns and schemes, and open the folder of finished groups."""
        oneshot = self._oneshot
        check_experts(model)
        names = find_targets(model, self.targets, self.ignore, self.pattern)
        check_packing(self, self.other_modifiers(), model, names)
        patterns, self._described = patterns_of(self, names)
        quantizer = Quantizer(self.quantization, model, names, prunes=self.prunes)
        if not self.prunes:  # what no scheme matches stays as it is
            names = {module: name for module, name in names.items() if module in quantizer.grids}
        doing = f"pruning: {self._described}" if self.prunes else "quantizing, without pruning"
        logger.info(f"{len(names)} modules, {doing}")
        experts = bool(find_experts(model, names))
        if not experts and self.expert_floor != EXPERT_FLOOR:
            raise RacError(
                f"expert_floor: {self.expert_floor} has no effect here: no routed expert of this "
                "model is pruned; leave it out"
            )
        recipe = self.model_dump(mode="json", exclude={"traces", "tokenizer"})
        before = {
            type(modifier).__name__: _settings(modifier)
            for modifier in active_session().lifecycle.recipe.modifiers
            if modifier is not self and modifier.initialized
        }
        about = {
            "recipe": recipe,
            "choice of earlier modifiers": before,
            "model": model_fingerprint(model),
        }
        self._processes.check_same(about)
        resume = Resume()
        if self._processes.is_first and oneshot is not None and oneshot.output_dir is not None:
            masters = self.recover is not None and self.quantization is not None
            check_disk(Path(oneshot.output_dir), model, names, masters=masters)
            about["environment"] = environment()
            resume = Resume(unfinished(oneshot.output_dir), about)
        return Run(self, names, patterns, quantizer, self._processes, experts, resume)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Begin the times and the phase that is reported."""
        self.run.begin()

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """End the run; forward passes quantize from now on."""
        self.run.end()
        self.run.quantizer.finish(state.model)

    def before_measuring(self, model: PreTrainedModel) -> None:
        """Train the kept weights, if the recipe says so."""
        if self._recovery is None:
            return
        self._processes.wait()
        remove_dispatch(model)  # an onloaded weight is a copy, and is not trained
        run = self.run
        quantized = run.quantizer.take_masters(run.names, run.masters)
        weights = {name: module for module, name in run.names.items()}
        self._recovered = self._recovery.run(model, weights, quantized)

    def after_measuring(self, model: PreTrainedModel) -> None:
        """Choose the layers whose activations a CPU rounds to 8 bits."""
        run = self.run
        grids = {run.names[module]: grid for module, grid in run.quantizer.grids.items()}
        errors = {name: record["relative_error"] for name, record in run.records.items()}
        sequences = [trace.sequence for trace in self.calibration_set.held_out]
        self._activations = choose_in_run(model, grids, errors, sequences)

    def _save_plan(self) -> SavePlan:
        run = self.run

        def prepare(model: PreTrainedModel, save_compressed: bool) -> None:
            if save_compressed:
                run.quantizer.compress()

        method: str = self.solver
        recovery = {"recovery": self._recovered} if self._recovered else {}
        pruned: dict[str, torch.nn.Linear] = {}
        pattern: dict[str, Any] = {}
        if self.prunes:
            pruned = {n: m for m, n in run.names.items() if isinstance(m, torch.nn.Linear)}
            first = next(iter(run.patterns.values()))
            pattern = {"pattern": self._described, "mask_structure": first.mask_structure}
        elif self.quantization is not None:
            method = "GPTQ, then coordinate descent"
        return SavePlan(
            patterns=run.patterns,
            modules=pruned,
            storage=self.storage,
            prepare=prepare,
            after=[run.resume.remove, *([self._recovery.remove] if self._recovery else [])],
            processes=self._processes,
            activations=self._activations,
            record=self.run_record(method, {**pattern, **run.record(), **recovery}),
        )


def _settings(modifier: Modifier) -> dict[str, str]:
    """Return another modifier's settings as text; names of its state end in an underscore."""
    values = modifier.model_dump().items()
    return {name: str(value) for name, value in values if not name.endswith("_")}
