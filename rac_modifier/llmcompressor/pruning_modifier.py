"""Reasoning-aware calibration, pruning and quantization in one recipe entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload import remove_dispatch
from llmcompressor.core import Event, State
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from pydantic import PrivateAttr
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.checkpoint.output_folder import unfinished
from rac_modifier.checkpoint.saving import SavePlan, save_with_record
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.calibration_modifier import CalibratingModifier
from rac_modifier.llmcompressor.forecast import Forecast, check_memory, groups_of
from rac_modifier.llmcompressor.oneshot_arguments import find_oneshot
from rac_modifier.llmcompressor.patterns import patterns_of
from rac_modifier.llmcompressor.quantizer import GroupQuantizer, NoQuantizer
from rac_modifier.llmcompressor.report import ExpertReport, Progress, strict_json
from rac_modifier.llmcompressor.resume import FinishedGroups, Resume, check_disk
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.statistics import Collector
from rac_modifier.llmcompressor.targets import check_later_modifiers, find_targets
from rac_modifier.settings.entries import PruningEntry


class ReasoningAwareSparseGPTModifier(PruningEntry, CalibratingModifier):
    """Prune in llm-compressor; `PruningEntry` says what it does and which settings it has."""

    requires_calibration_data: bool = True

    _run: Run | None = PrivateAttr(default=None)
    _described: str = PrivateAttr(default="")  # the patterns in words
    _collector: Collector | None = PrivateAttr(default=None)  # of a run by hooks

    @property
    def run(self) -> Run:
        """Return the run, once the modifier is initialized."""
        assert self._run is not None
        return self._run

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check everything that can be checked, then sample and mix the calibration set."""
        self.check_run(state, prunes=True)
        model, oneshot = state.model, find_oneshot()
        quantizes = self.quantization is not None
        check_later_modifiers(self, self.other_modifiers(later=True), quantizes=quantizes)
        self._run = self._make_run(model, oneshot)
        self._check_memory(model, oneshot)
        self.prepare(state, quantizes=quantizes)
        self.run.quantizer.attach(model)
        save_with_record(model, self._save_plan)
        self.calibrate_session(state, self.run)
        return True

    def _make_run(self, model: PreTrainedModel, oneshot: Oneshot | None) -> Run:
        """Resolve targets, patterns and schemes, and open the folder of finished groups."""
        names = find_targets(model, self.targets, self.ignore, self.pattern)
        patterns, self._described = patterns_of(self, model, names)
        quantizer = NoQuantizer()
        if self.quantization is not None:
            quantizer = GroupQuantizer(self.quantization, model, names, prunes=self.prunes)
            if not self.prunes:  # what no scheme matches stays as it is
                names = {
                    module: name for module, name in names.items() if module in quantizer.grids
                }
        if self.prunes:
            logger.info(f"pruning {len(names)} modules: {self._described}")
        else:
            logger.info(f"quantizing {len(names)} modules, without pruning")
        experts = ExpertReport(self, model, names)
        experts.check(oneshot)
        resume = Resume()
        if oneshot is not None and oneshot.output_dir is not None:
            masters = self.recover is not None and self.quantization is not None
            check_disk(Path(oneshot.output_dir), model, names, masters=masters)
            resume = FinishedGroups(unfinished(oneshot.output_dir), self.about_run(model))
        return Run(self, names, patterns, quantizer, self._processes, experts, resume)

    def _check_memory(self, model: PreTrainedModel, oneshot: Oneshot | None) -> None:
        """Refuse what does not fit into memory, before anything is sampled (RacError)."""
        offload = oneshot.dataset_args.sequential_offload_device if oneshot else "cpu"
        count, run = self._processes.count, self.run
        forecast = Forecast.of(
            self,
            model,
            groups_of(run.names, run.quantizer.grids),
            self.known_share,
            by_layer=self.order == "layer",
            processes=count,
        )
        check_memory(forecast, get_main_device(), torch.device(offload), processes=count)

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Begin the progress bar; watch the inputs of all modules where upstream's loop runs the model."""
        run = self.run
        shapes: dict[str, Any] = {
            name: tuple(module.get_parameter("weight").shape) for module, name in run.names.items()
        }
        run.progress = Progress(shapes, shown=self._processes.is_first, prunes=self.prunes)
        if not run.by_hooks:
            return
        collector = self._collector = Collector(run.names, run.processes)

        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            loader, batch = state.data.calib, state.current_batch_idx
            if not isinstance(loader, CalibrationLoader):
                raise RacError(
                    "the pipeline does not run on this recipe's calibration set; use pipeline='independent'"
                )
            collector.observe(module, args[0], loader.token_weights[batch], batch)

        for module in run.names:
            self.register_hook(module, hook, "forward_pre")  # type: ignore[arg-type]

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Prune the modules that upstream's loop has run."""
        if self._collector is not None:
            self.run.prune(self._collector.take(modules))

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """End the run; forward passes quantize from here on."""
        self.remove_hooks()
        self._collector = None
        self.run.end()
        self.run.quantizer.finish(state.model)

    def after_pruning(self, model: PreTrainedModel) -> None:
        """Train the kept weights, where the recipe asks for recovery."""
        if self._recovery is None:
            return
        if self._processes.count > 1:
            self._processes.meet()
            remove_dispatch(model)  # FSDP places the weights itself
        run = self.run
        quantized = run.quantizer.take_masters(run.names, run.masters)
        weights = {name: module for module, name in run.names.items()}
        self._recovered = self._recovery.run(model, weights, quantized)

    def _save_plan(self) -> SavePlan:
        run = self.run

        def prepare(model: PreTrainedModel, save_compressed: bool) -> None:
            if save_compressed:
                run.quantizer.compress()

        method: str = self.solver
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
            tokenizer=self.tokenizer_name,
            prepare=prepare,
            after=[run.resume.remove, *([self._recovery.remove] if self._recovery else [])],
            processes=self._processes,
            record=strict_json({"method": method, **pattern, **self.run_record(), **run.record()}),
        )
