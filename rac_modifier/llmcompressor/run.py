"""What a pruning run shares: the modifier makes it, the loop goes through it, the record is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from compressed_tensors.utils import update_offload_parameter
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.quantizer import NoQuantizer
from rac_modifier.llmcompressor.report import ExpertReport, Progress
from rac_modifier.llmcompressor.resume import Resume
from rac_modifier.llmcompressor.solving import (
    Pruned,
    problems_per_call,
    solve_groups,
    solve_on_all_ranks,
)
from rac_modifier.llmcompressor.statistics import InputGroup
from rac_modifier.processes import Processes
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern


@dataclass
class Run:
    """One run of a recipe entry on a model.

    Attributes:
        entry: the recipe's.
        names: the modules to prune, in the model's order, and their names.
        patterns: of each module, by name.
        quantizer: the schemes of the modules; with no module where the recipe does not quantize.
        processes: the ranks that share the run.
        experts: what is said about routed experts.
        resume: what an earlier run had pruned, and what this one has.
        progress: times and the progress bar; it begins with calibration.
        records: of each pruned module, by name, for the run record.
        masters: float32 weights before they were rounded, by name, for recovery.
        plan: the order of the run and why, for the run record.
        by_hooks: whether upstream's loop runs the model, and the modifier observes inputs by hooks.
    """

    entry: PruningEntry
    names: dict[torch.nn.Module, str]
    patterns: dict[str, Pattern]
    quantizer: NoQuantizer
    processes: Processes
    experts: ExpertReport
    resume: Resume
    progress: Progress = field(default_factory=lambda: Progress({}))
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    masters: dict[str, torch.Tensor] = field(default_factory=dict)
    plan: dict[str, str] = field(default_factory=dict)
    by_hooks: bool = False

    @property
    def dense_target(self) -> bool:
        """Return whether modules aim at the dense model's outputs."""
        return self.plan.get("reconstruct", self.entry.reconstruct) == "dense"

    def use_order(self, order: str, why: str) -> None:
        """Record the order of the run.

        Raises:
            RacError: the recipe asks for `group`, and that is not possible.
        """
        if self.entry.order == "group" and order != "group":
            raise RacError(f"order: group is not possible here: {why}; set order: layer")
        self.plan = {"order": order, "why": why, "reconstruct": self.entry.reconstruct}
        if order == "layer" and self.entry.reconstruct == "dense":
            self.plan["reconstruct"] = "pruned"
            logger.warning(
                f"reconstruct: dense needs the model cut between its modules, which is not possible here ({why}): pruning layer "
                "by layer towards the pruned model's own outputs instead, which keeps less accuracy"
            )
        self.experts.use_order(order, why)
        doing = "pruning" if self.entry.prunes else "quantizing"
        logger.info(f"{doing} {order} by {order} ({why})")

    def has_pruned(self, modules: Sequence[torch.nn.Module]) -> bool:
        """Return whether an earlier run, which was killed, has pruned all of these modules."""
        return self.resume.has([self.names[module] for module in modules])

    def restore(self, modules: Sequence[torch.nn.Module]) -> None:
        """Restore the pruned weights of these modules from the earlier run."""
        self.processes.meet()  # ranks that share the model's memory may read its dense weights until now
        for module in modules:
            name = self.names[module]
            self.records[name] = self.resume.restore(name, module, self.masters)
            self.progress.restored(name)

    def prune(self, groups: Sequence[InputGroup], per_call: int | None = None) -> None:
        """Prune the modules of each group, and quantize them if the recipe says so; groups do not depend on each other.

        `per_call` is the number of groups that one solver call takes (default: chosen for speed).
        """

        def solve(call: Sequence[InputGroup]) -> list[list[Pruned]]:
            return solve_groups(self.entry, call, self.names, self.patterns, self.quantizer)

        def count(group: InputGroup) -> int:
            device = group.statistics.hessian.device
            return per_call or problems_per_call(group.modules, device, self.entry)

        for group, pruned in solve_on_all_ranks(groups, self.names, self.processes, solve, count):
            for module, result in zip(group.modules, pruned, strict=True):
                self._store(module, result)
            self.progress.done([self.names[module] for module in group.modules])
        if self.processes.is_first:
            modules = {self.names[module]: module for group in groups for module in group.modules}
            self.resume.add(modules, self.records, self.masters)

    def _store(self, module: torch.nn.Module, result: Pruned) -> None:
        name, record = self.names[module], result.record
        if record["retries"]:
            logger.warning(
                f"{name}: the dampening was raised {record['retries']} times to factor its Hessian, to "
                f"{record['dampening']:.4g}"
            )
        self.records[name] = record
        if result.scale is None:
            update_offload_parameter(module, "weight", result.weight)
        else:
            self.quantizer.store(module, result.weight, result.scale, result.zero_point)
        if result.master is not None:
            self.masters[name] = result.master

    def end(self) -> None:
        """End pruning: a module that no calibration token reached is an error, not a silent gap (RacError)."""
        self.progress.close()
        missed = [name for name in self.names.values() if name not in self.records]
        if missed:
            raise RacError(
                f"{len(missed)} modules saw no calibration token, the first is {missed[0]}; add them to ignore, "
                "or calibrate on more tokens if they are experts"
            )

    def record(self) -> dict[str, Any]:
        """Return the entries of the run record about pruning."""
        return {
            "order": self.plan,
            "preset": self.entry.preset,
            **self.experts.record(),
            "time": self.progress.record(),
            "modules": [self.records[n] for n in self.names.values() if n in self.records],
        }
