"""Hold what a pruning run shares: the modifier makes it, the loop prunes through it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from compressed_tensors.distributed import greedy_bin_packing
from compressed_tensors.utils import update_offload_parameter
from loguru import logger
from torch import Tensor

from rac_modifier.distributed.processes import Processes
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.quantizer import Quantizer
from rac_modifier.llmcompressor.resume import Resume
from rac_modifier.llmcompressor.solving import Pruned, solve_groups
from rac_modifier.llmcompressor.statistics import InputGroup, check_same_groups
from rac_modifier.pruning import sparsegpt
from rac_modifier.runtime.cpu_tuning import return_freed_memory
from rac_modifier.runtime.progress import Phase
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.solvers import SOLVERS


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
    masters: dict[str, Tensor] = field(default_factory=dict)
    plan: dict[str, str] = field(default_factory=dict)  # the order of the run, and why
    experts: dict[str, Any] = field(default_factory=dict)  # tokens that calibrate them, by layer
    _restored: set[str] = field(default_factory=set)  # modules that a killed run has pruned
    _phase: Any = None
    _start: float = 0.0
    _seconds: float = 0.0

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
                "reconstruct: dense needs the model cut between its modules, not possible here "
                f"({why}): pruning by layer towards the pruned model's outputs, with less accuracy"
            )
        if order == "layer" and self.has_experts and self.entry.order != "layer":
            logger.warning(
                "each expert is calibrated on all tokens instead of its own, which keeps less "
                f"accuracy: that needs the model cut between its modules ({why})"
            )
        logger.info(f"{order} by {order} ({why})")

    def follow_names(self, model: torch.nn.Module) -> None:
        """Take the modules' names anew: REAPPruningModifier removes and renumbers experts."""
        names = {module: name for name, module in model.named_modules() if module in self.names}
        new_names = {old: names[module] for module, old in self.names.items() if module in names}
        self.patterns = {new: self.patterns[old] for old, new in new_names.items()}
        self.quantizer.follow_names(new_names, names)
        self.names = names

    def go_on(self, about: Mapping[str, Any]) -> None:
        """Go on from what a killed run has pruned, on all ranks (RacError: of another run)."""
        self.resume.begin(about)
        self._restored = set(self.processes.from_first(sorted(self.resume.names)))

    def begin(self) -> None:
        """Begin the times and the phase that is reported."""
        self._start = time.monotonic()
        shown, restored = self.processes.is_first, len(self._restored)
        doing = "pruning" if self.entry.prunes else "quantizing"
        self._phase = Phase(doing, len(self.names), restored, unit="modules", shown=shown)

    def has_pruned(self, modules: Sequence[torch.nn.Module]) -> bool:
        """Return whether a killed run has pruned all of these modules."""
        return bool(modules) and all(self.names[module] in self._restored for module in modules)

    def restore(self, modules: Sequence[torch.nn.Module]) -> None:
        """Restore the pruned weights of these modules, which the first rank reads and sends."""
        self.processes.wait()  # until now, ranks with shared memory may read dense weights
        for module in modules:
            pruned = None
            if self.processes.is_first:
                pruned = self.resume.restored(self.names[module], module)
            self._store(module, _broadcast([pruned], 0, self.processes)[0])

    def prune(self, groups: Sequence[InputGroup], per_call: int | None = None) -> None:
        """Prune, and quantize if asked for, independent groups; `per_call` in a solver call."""
        for group, pruned in self.solve_on_all_ranks(groups, per_call):
            for module, result in zip(group.modules, pruned, strict=True):
                self._store(module, result)
                self._phase.advance(self.names[module])
        if self.processes.is_first:
            modules = {self.names[module]: module for group in groups for module in group.modules}
            self.resume.add(modules, self.records, self.masters)

    def solve_on_all_ranks(
        self, groups: Sequence[InputGroup], per_call: int | None = None
    ) -> Iterator[tuple[InputGroup, list[Pruned]]]:
        """Yield each group with its pruned modules: the same bits for any rank count.

        Each call is solved on one rank, and sent to the others after all have solved, because
        weights may be shared memory. RacError if the ranks have calibrated different modules.
        """
        processes = self.processes
        if processes.count > 1:
            processes.wait()
            check_same_groups(groups, self.names, processes)
        for group in groups:
            group.statistics.finish()
        calls: list[list[InputGroup]] = []
        for _, same in groupby(groups, lambda g: [module.weight.shape for module in g.modules]):
            alike = list(same)
            device = alike[0].statistics.hessian.device
            step = per_call or self.problems_per_call(alike[0].modules, device)
            calls += [alike[i : i + step] for i in range(0, len(alike), step)]
        return_freed_memory()
        if processes.count == 1:
            for call in calls:
                yield from zip(call, self._solve(call), strict=True)
            return
        sizes = [
            sum(m.get_parameter("weight").numel() for group in call for m in group.modules)
            for call in calls
        ]
        # the largest call first, to the rank with the fewest weights so far
        places = list(range(len(calls)))
        rank_of: dict[int, int] = greedy_bin_packing(places, processes.count, sizes.__getitem__)[2]
        results: dict[torch.nn.Module, Pruned] = {}
        for i, call in enumerate(calls):
            if rank_of[i] == processes.rank:
                for group, pruned in zip(call, self._solve(call), strict=True):
                    results |= zip(group.modules, pruned, strict=True)
        processes.wait()
        for i, call in enumerate(calls):
            for group in call:
                mine = [results.get(module) for module in group.modules]
                yield group, _broadcast(mine, rank_of[i], processes)

    def problems_per_call(self, modules: Sequence[torch.nn.Module], device: torch.device) -> int:
        """Return how many groups of this shape a solver call takes; SparseGPT and rounding gain."""
        if not SOLVERS[self.entry.solver].batches and self.entry.quantization is None:
            return 1
        shapes = [module.get_parameter("weight").shape for module in modules]
        return sparsegpt.problems_per_batch(shapes[0][1], sum(s[0] for s in shapes), device)

    def _solve(self, call: Sequence[InputGroup]) -> list[list[Pruned]]:
        return solve_groups(self.entry, call, self.names, self.patterns, self.quantizer)

    def _store(self, module: torch.nn.Module, result: Pruned) -> None:
        """Put a pruned weight, and its scales and zero points (None: 0), into a module."""
        name = self.names[module]
        self.records[name] = result.record
        update_offload_parameter(module, "weight", result.weight)
        if result.scale is not None:
            update_offload_parameter(module, "weight_scale", result.scale)
            zeros = torch.zeros_like(module.get_parameter("weight_zero_point").detach())
            zeros = zeros if result.zero_point is None else result.zero_point.to(zeros.dtype)
            update_offload_parameter(module, "weight_zero_point", zeros)
        if result.global_scale is not None:
            update_offload_parameter(module, "weight_global_scale", result.global_scale)
        if result.master is not None:
            self.masters[name] = result.master

    def end(self) -> None:
        """End pruning; RacError for a module that no calibration token reached."""
        self._seconds = round(time.monotonic() - self._start, 3)
        self._phase.close()
        missed = [name for name in self.names.values() if name not in self.records]
        if missed:
            raise RacError(
                f"{len(missed)} modules saw no calibration token, the first is {missed[0]}; add "
                "them to ignore, or calibrate on more tokens"
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


def _broadcast(results: Sequence[Pruned | None], source: int, processes: Processes) -> list[Pruned]:
    """Return on every rank the results of the rank `source`."""
    about = [result and [result.record, list(result.tensors)] for result in results]
    received = []
    for result, (record, names) in zip(results, processes.from_all(about)[source], strict=True):
        tensors = {name: processes.send(getattr(result, name, None), source) for name in names}
        if "master" in tensors:
            tensors["master"] = tensors["master"].cpu()
        received.append(Pruned(record, **tensors))
    return received
