"""Reasoning-aware calibration, pruning and quantization in one recipe entry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from compressed_tensors.offload import remove_dispatch
from compressed_tensors.utils import update_offload_parameter
from llmcompressor.core import Event, State
from llmcompressor.utils.dev import get_main_device
from loguru import logger
from pydantic import PrivateAttr
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.checkpoint.output_folder import unfinished
from rac_modifier.checkpoint.saving import SavePlan, save_with_record
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.activation_stage import ActivationStage
from rac_modifier.llmcompressor.calibrating_modifier import CalibratingModifier
from rac_modifier.llmcompressor.expert_record import ExpertRecord
from rac_modifier.llmcompressor.finished_groups import FinishedGroups, check_disk
from rac_modifier.llmcompressor.group_shape import GroupShape
from rac_modifier.llmcompressor.input_groups import HessianCollector, InputGroup
from rac_modifier.llmcompressor.memory import MemoryNeed
from rac_modifier.llmcompressor.memory_check import check_memory
from rac_modifier.llmcompressor.oneshot_arguments import find_oneshot
from rac_modifier.llmcompressor.progress import PruningProgress
from rac_modifier.llmcompressor.quantizer import GroupQuantizer, rounding_of
from rac_modifier.llmcompressor.recovery_stage import RecoveryStage, before_sampling
from rac_modifier.llmcompressor.shares import describe_patterns, listed_patterns
from rac_modifier.llmcompressor.solving import Pruned, end_lanes, solve_groups, solve_together
from rac_modifier.llmcompressor.targets import check_later_modifiers, find_targets
from rac_modifier.llmcompressor.zeros import patterns_of_zeros
from rac_modifier.processes import Processes
from rac_modifier.pruning.routed_tokens import ExpertTokens
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern


class ReasoningAwareSparseGPTModifier(PruningEntry, CalibratingModifier):
    """llm-compressor's side of the recipe entry `PruningEntry`, which says what it does and which settings it has."""

    requires_calibration_data: bool = True

    _patterns: dict[str, Pattern] = PrivateAttr(default_factory=dict)
    _described: str = PrivateAttr(default="")
    _names: dict[torch.nn.Module, str] = PrivateAttr(default_factory=dict)
    _collector: HessianCollector | None = PrivateAttr(default=None)
    _quantizer: GroupQuantizer | None = PrivateAttr(default=None)
    _progress: PruningProgress | None = PrivateAttr(default=None)
    _recovery: RecoveryStage | None = PrivateAttr(default=None)
    _recovered: dict[str, Any] = PrivateAttr(default_factory=dict)
    _finished: FinishedGroups | None = PrivateAttr(default=None)
    _masters: dict[str, torch.Tensor] = PrivateAttr(
        default_factory=dict
    )  # weights before they were rounded
    _activations: ActivationStage | None = PrivateAttr(default=None)
    _experts: ExpertRecord | None = PrivateAttr(default=None)
    _order: dict[str, str] = PrivateAttr(default_factory=dict)
    _results: dict[str, dict[str, Any]] = PrivateAttr(default_factory=dict)

    def calibrated_modules(self) -> dict[torch.nn.Module, str]:
        """The modules whose inputs are collected, and their names."""
        return dict(self._names)

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's activations have to be carried beside the pruned model's."""
        return self.reconstruct == "dense"

    @property
    def processes(self) -> Processes:
        """Those that share the run."""
        return self._processes

    def use_order(self, order: Literal["group", "layer"], why: str) -> None:
        """Record the granularity that the pipeline chose.

        Raises:
            RacError: when the recipe asks for the other one, or for what needs it.
        """
        if self.order == "group" and order != "group":
            raise RacError(f"order: group is not possible here: {why}; set order: layer")
        self._order = {"order": order, "why": why, "reconstruct": self.reconstruct}
        if order == "layer" and self.reconstruct == "dense":
            self._order["reconstruct"] = "pruned"
            logger.warning(
                f"reconstruct: dense needs the model cut between its modules, which is not possible here ({why}): pruning layer "
                "by layer towards the pruned model's own outputs instead, which keeps less accuracy"
            )
        if self._experts is not None:
            self._experts.use_order(order, why)
        logger.info(f"{'pruning' if self.prunes else 'quantizing'} {order} by {order} ({why})")

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Check everything that can be checked, then sample and mix the calibration set."""
        self.check_run(state, prunes=True)
        model, oneshot = state.model, find_oneshot()
        self._names = find_targets(model, self.targets, self.ignore, self.pattern)
        check_later_modifiers(
            self, self.other_modifiers(later=True), quantizes=self.quantization is not None
        )
        if self.solver == "keep":
            detect = self.mask_structure is None
            self._patterns, self._described = patterns_of_zeros(
                self._names, self.pattern, detect=detect
            )
        elif self.solver == "none":
            self._patterns = dict.fromkeys(self._names.values(), Pattern.nothing())
        else:
            assert self.pattern is not None  # as PruningSettings has checked
            self._patterns = listed_patterns(model, self._names, self.pattern, self.allocation)
            self._described = describe_patterns(self.pattern, self.allocation)
        if self.quantization is not None:
            self._quantizer = GroupQuantizer(
                self.quantization, model, self._names, prunes=self.prunes
            )
            self._activations = ActivationStage.of(
                self.quantization, self._quantizer, self._names, oneshot
            )
            if not self.prunes:  # what no scheme matches stays as it is
                self._names = {
                    module: name
                    for module, name in self._names.items()
                    if module in self._quantizer.grids
                }
        doing, how = (
            ("pruning", f": {self._described}")
            if self.prunes
            else ("quantizing", ", without pruning")
        )
        logger.info(f"{doing} {len(self._names)} modules{how}")
        self._experts = ExpertRecord(self, model, self._names)
        self._experts.check(oneshot)
        offload = oneshot.dataset_args.sequential_offload_device if oneshot else "cpu"
        if oneshot is not None and oneshot.output_dir is not None:
            masters = self.recover is not None and self.quantization is not None
            check_disk(Path(oneshot.output_dir), model, self._names, masters=masters)
            self._finished = FinishedGroups(unfinished(oneshot.output_dir), self.about_run(model))
        self.check_memory(model, [], get_main_device(), torch.device(offload))
        recover, run = self.recover, (self._processes, self.quantization is not None)
        text = before_sampling(model, lambda: self._load_tokenizer(model), recover, *run)
        self.build_calibration(state, recover.reserved_tokens if recover else 0)
        if recover is not None:
            reserved = self.calibration_set.reserved
            self._recovery = RecoveryStage(
                model, reserved, recover, self._finished is not None, *run, text
            )
        if self._quantizer is not None:
            self._quantizer.attach(model)
        save_with_record(model, self._plan)
        self.calibrate_session(state, self)
        return True

    def check_memory(
        self,
        model: PreTrainedModel,
        groups: list[list[torch.nn.Module]],
        onload: torch.device,
        offload: torch.device,
    ) -> int:
        """Refuse to start where the largest of these groups (none: of the modules) needs more memory than is free.

        Returns:
            0; or, where it fits only if stages run twice before those that read so many columns, that number (pruned_stream.py).

        Raises:
            RacError: naming the module, the bytes needed and free, and what to change.
        """
        by_layer = "layer" in (self.order, self._order.get("order"))
        count = self._processes.count
        need = MemoryNeed.of(
            self, self.known_share, model, self._names.values(), by_layer=by_layer, processes=count
        )
        each = groups or [[module] for module in self._names]
        shapes = (
            GroupShape.by_layer(model, self._names)
            if by_layer
            else GroupShape.by_group(model, self._names, each)
        )
        return check_memory(need, shapes, onload, offload, processes=count).twice_before

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Watch the inputs of every module to prune."""
        shapes: dict[str, Any] = {
            name: tuple(module.weight.shape)  # type: ignore[arg-type]
            for module, name in self._names.items()
        }
        self._progress = PruningProgress(shapes, shown=self._processes.is_first, prunes=self.prunes)
        collector = self._collector = HessianCollector(self._names)

        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            loader, batch = state.data.calib, state.current_batch_idx
            if not isinstance(loader, CalibrationLoader):
                raise RacError(
                    "the pipeline does not run on this recipe's calibration set; use pipeline='independent'"
                )
            collector.observe(module, args[0], loader.token_weights[batch], batch)

        for module in self._names:
            self.register_hook(module, hook, "forward_pre")  # type: ignore[arg-type]

    def resume(self) -> None:
        """Find what a run of the same recipe, model and calibration set had pruned before it was killed."""
        if self._finished is not None:
            self._finished.begin({"order": self._order["order"], **self.calibration_set.identity()})

    def was_pruned(self, modules: Iterable[torch.nn.Module]) -> bool:
        """Whether all of these were pruned before the last run was killed."""
        return self._finished is not None and self._finished.has(
            [self._names[module] for module in modules]
        )

    def restore(self, modules: Iterable[torch.nn.Module]) -> None:
        """Put the pruned weights of these modules back."""
        assert self._finished is not None
        assert self._progress is not None
        self._processes.meet()  # where they share the model's memory, another one may need the dense weights until here
        for name, module in ((self._names[module], module) for module in modules):
            self._results[name] = self._finished.restore(name, module, self._masters)
            self._progress.restored(name)

    def on_subgraph_start(self, modules: Iterable[torch.nn.Module]) -> None:
        """Layer by layer: the coming forward passes run these modules."""
        assert self._collector is not None
        self._collector.expect(module for module in modules if module in self._names)

    def end_lanes(self, count: int) -> None:
        """Layer by layer: so many lanes of the calibration set have ended."""
        assert self._collector is not None
        end_lanes(self._collector.present(), self._names, self._processes, count)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Prune what the finished subgraph has calibrated."""
        assert self._collector is not None
        self.prune_groups(self._collector.take(modules))

    def record_experts(self, name: str, tokens: Mapping[str, ExpertTokens]) -> None:
        """Record what the experts of a layer were calibrated on."""
        assert self._experts is not None
        self._experts.add(name, tokens)

    def prune_groups(self, groups: Sequence[InputGroup], together: int | None = None) -> None:
        """Prune the modules of each group, which read the same input, and quantize them if the recipe says so."""

        def solve(some: Sequence[InputGroup]) -> list[list[Pruned]]:
            return solve_groups(self, some, self._names, self._patterns, self._quantizer)

        for group, found in solve_together(
            groups, self._names, self._processes, solve, self.gains_at_once, together
        ):
            for module, pruned in zip(group.modules, found, strict=True):
                name, record = self._names[module], pruned.record
                if record["retries"]:
                    logger.warning(
                        f"{name}: the dampening was raised {record['retries']} times to factor its Hessian, to "
                        f"{record['dampening']:.4g}"
                    )
                self._results[name] = record
                if self._quantizer is None or pruned.scale is None:
                    update_offload_parameter(module, "weight", pruned.weight)
                else:
                    self._quantizer.store(module, pruned.weight, pruned.scale, pruned.zero_point)
                if pruned.master is not None:
                    self._masters[name] = pruned.master
            assert self._progress is not None
            self._progress.done([self._names[module] for module in group.modules])
        if self._finished is not None and self._processes.is_first:
            done = {self._names[module]: module for group in groups for module in group.modules}
            self._finished.add(done, self._results, self._masters)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Stop watching; a module that no calibration token reached is an error, not a silent gap."""
        self.remove_hooks()
        if self._progress is not None:
            self._progress.close()
        missed = [name for name in self._names.values() if name not in self._results]
        if missed:
            raise RacError(
                f"{len(missed)} modules saw no calibration token, the first is {missed[0]}; add them to ignore, "
                "or calibrate on more tokens if they are experts"
            )
        if self._quantizer is not None:
            self._quantizer.finish(state.model)

    def after_pruning(self, model: PreTrainedModel) -> None:
        """Recovery, where the recipe asks for it."""
        if self._recovery is None:
            return
        if self._processes.count > 1:
            self._processes.meet()
            remove_dispatch(model)  # FSDP places the weights itself
        quantized = (
            self._quantizer.take_masters(self._names, self._masters) if self._quantizer else {}
        )
        self._recovered = self._recovery.run(
            model, {name: module for module, name in self._names.items()}, quantized
        )

    def after_measuring(self, model: PreTrainedModel) -> None:
        """The bits of activations, where the recipe asks for them."""
        if self._activations is not None:
            self._activations.measure(
                model, self._names, self._results, self.calibration_set.held_out
            )

    def _plan(self) -> SavePlan:
        def prepare(model: PreTrainedModel, save_compressed: bool) -> None:
            if self._quantizer is not None and save_compressed:
                self._quantizer.compress()

        pruned = {
            name: module
            for module, name in self._names.items()
            if isinstance(module, torch.nn.Linear)
        }
        pattern = {
            "pattern": self._described,
            "mask_structure": next(iter(self._patterns.values())).mask_structure,
        }
        return SavePlan(
            patterns=self._patterns,
            modules=pruned if self.prunes else {},
            storage=self.storage,
            int8_activations=self._activations.modules if self._activations else (),
            tokenizer=self.tokenizer_name,
            prepare=prepare,
            after=[state.remove for state in (self._finished, self._recovery) if state is not None],
            processes=self._processes,
            record={
                "method": self.solver
                if self.quantization is None or self.prunes
                else rounding_of(self.quantization),
                "order": self._order,
                "preset": self.preset,
                **(pattern if self.prunes else {}),
                **self.run_record(),
                **(self._experts.record() if self._experts else {}),
                "time": self._progress.record() if self._progress else {},
                **({"recovery": self._recovered} if self._recovered else {}),
                **(self._activations.record() if self._activations else {}),
                "modules": [
                    self._results[name] for name in self._names.values() if name in self._results
                ],
            },
        )
