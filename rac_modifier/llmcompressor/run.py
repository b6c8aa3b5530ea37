"""Hold what a pruning run shares: the modifier makes it, the loop prunes through it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.utils import update_offload_parameter
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.quantizer import Quantizer
from rac_modifier.llmcompressor.resume import Resume
from rac_modifier.llmcompressor.solving import (
    Pruned,
    problems_per_call,
    solve_groups,
    solve_on_all_ranks,
)
from rac_modifier.llmcompressor.statistics import InputGroup
from rac_modifier.processes import Processes
from rac_modifier.progress import StepProgress
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern


@dataclass
class Run:
    """Run a recipe entry on a model."""

    entry: PruningEntry
    names: dict[torch.nn.Module, str]  # of the modules to prune, in the model's order
    patterns: dict[str, Pattern]
    quantizer: Quantizer  # empty if the recipe does not quantize
    processes: Processes
    has_experts: bool  # whether any of the modules is a routed expert's
    resume: Resume
    # the run record's entry of each pruned module, and weights before rounding, by name
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    masters: dict[str, torch.Tensor] = field(default_factory=dict)
    plan: dict[str, str] = field(default_factory=dict)  # the order of the run, and why
    experts: dict[str, Any] = field(default_factory=dict)  # tokens that calibrate them, by layer
    _progress: Any = None
    _start: float = 0.0
    _seconds: float = 0.0

    @property
    def _doing(self) -> str:
        return "pruning" if self.entry.prunes else "quantizing"

    @property
    def dense_target(self) -> bool:
        """Return whether modules aim at the dense model's outputs."""
        return self.plan.get("reconstruct", self.entry.reconstruct) == "dense"

    def use_order(self, order: str, why: str) -> None:
        """Record the order of the run; RacError if `order: group` is impossible."""
        if self.entry.order == "group" and order != "group":
            raise RacError(f"order: group is not possible here: {why}; set order: layer")
        self.plan = {"order": order, "why": why, "reconstruct": self.entry.reconstruct}
        if order == "layer" and self.entry.reconstruct == "dense":
            self.plan["reconstruct"] = "pruned"
            logger.warning(
                "reconstruct: dense needs the model cut between its modules, which is not "
                f"possible here ({why}): pruning layer by layer towards the pruned model's "
                "own outputs, which keeps less accuracy"
            )
        if order == "layer" and self.has_experts and self.entry.order != "layer":
            logger.warning(
                "each expert is calibrated on all tokens instead of its own, which keeps less "
                f"accuracy: that needs the model cut between its modules ({why})"
            )
        logger.info(f"{self._doing} {order} by {order} ({why})")

    def begin(self) -> None:
        """Begin the times and the progress bar."""
        self._start = time.monotonic()
        shown, restored = self.processes.is_first, len(self.resume.names)
        self._progress = StepProgress(self._doing, len(self.names), restored, shown=shown)

    def has_pruned(self, modules: Sequence[torch.nn.Module]) -> bool:
        """Return whether a killed run has pruned all of these modules."""
        return self.resume.has([self.names[module] for module in modules])

    def restore(self, modules: Sequence[torch.nn.Module]) -> None:
        """Restore the pruned weights of these modules from the earlier run."""
        self.processes.wait()  # until now, ranks with shared memory may read dense weights
        for module in modules:
            name = self.names[module]
            self.records[name] = self.resume.restore(name, module, self.masters)

    def prune(self, groups: Sequence[InputGroup], per_call: int | None = None) -> None:
        """Prune, and quantize if asked for, groups that do not depend on each other.

        `per_call` is the number of groups that one solver call takes (default: chosen for
        speed).
        """

        def solve(call: Sequence[InputGroup]) -> list[list[Pruned]]:
            return solve_groups(self.entry, call, self.names, self.patterns, self.quantizer)

        def count(group: InputGroup) -> int:
            device = group.statistics.hessian.device
            return per_call or problems_per_call(group.modules, device, self.entry)

        for group, pruned in solve_on_all_ranks(groups, self.names, self.processes, solve, count):
            for module, result in zip(group.modules, pruned, strict=True):
                self._store(module, result)
        if self.processes.is_first:
            modules = {self.names[module]: module for group in groups for module in group.modules}
            self.resume.add(modules, self.records, self.masters)

    def _store(self, module: torch.nn.Module, result: Pruned) -> None:
        name = self.names[module]
        self.records[name] = result.record
        if result.scale is None:
            update_offload_parameter(module, "weight", result.weight)
        else:
            self.quantizer.store(module, result.weight, result.scale, result.zero_point)
        if result.master is not None:
            self.masters[name] = result.master
        self._progress.step(name)

    def end(self) -> None:
        """End pruning; RacError for a module that no calibration token reached."""
        self._seconds = round(time.monotonic() - self._start, 3)
        self._progress.close()
        missed = [name for name in self.names.values() if name not in self.records]
        if missed:
            raise RacError(
                f"{len(missed)} modules saw no calibration token, the first is "
                f"{missed[0]}; add them to ignore, or calibrate on more tokens if they are "
                "experts"
            )

    def record(self) -> dict[str, Any]:
        """Return the entries of the run record about pruning."""
        record: dict[str, Any] = {
            "order": self.plan,
            "preset": self.entry.preset,
            "time": {"seconds": self._seconds},
            "modules": [self.records[n] for n in self.names.values() if n in self.records],
        }
        if self.has_experts:
            tokens = "routed" if self.plan.get("order") == "group" else "all"
            record["experts"] = {"calibrated on": tokens, "layers": self.experts}
        return record
