"""Prune groups from their statistics, on this rank or each call on one of several.

`Run` is what a pruning run shares: the modifier makes it, the loop prunes through it, and
the run record is made of it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from compressed_tensors.distributed import greedy_bin_packing
from compressed_tensors.utils import align_module_device, update_offload_parameter
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.experts import ExpertReport
from rac_modifier.llmcompressor.quantizer import Quantizer
from rac_modifier.llmcompressor.resume import Resume
from rac_modifier.llmcompressor.statistics import InputGroup, check_same_groups
from rac_modifier.platform import return_freed_memory
from rac_modifier.processes import Processes
from rac_modifier.progress import StepProgress
from rac_modifier.pruning import sparsegpt
from rac_modifier.pruning.solve import Problem, Solution, solve_many
from rac_modifier.quantization.grid import Grid
from rac_modifier.quantization.solve import PrunedProblem, Quantized, quantize_many
from rac_modifier.recovery.on_grid import codes_of, master_in_cell
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern

_TENSORS = ("weight", "scale", "zero_point", "master")


@dataclass(frozen=True)
class Pruned:
    """Hold a pruned module, as it is stored.

    Attributes:
        record: its entry of the run record.
        weight: [rows, columns] in the dtype of the module.
        scale: of the rounded weight; None if it is not rounded.
        zero_point: int8, in the shape of the scales, on an asymmetric grid; else None.
        master: float32 [rows, columns] on the CPU: where recovery of a rounded weight
            starts, within the cells of its codes, towards the weight before rounding; None
            without recovery.
    """

    record: dict[str, Any]
    weight: torch.Tensor
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    master: torch.Tensor | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what is stored, by attribute."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@dataclass
class Run:
    """Run a recipe entry on a model.

    Attributes:
        entry: the recipe's.
        names: the modules to prune, in the model's order, and their names.
        quantizer: empty if the recipe does not quantize.
        records: the run record's entry of each pruned module, by name.
        masters: float32 weights before they were rounded, by name, for recovery.
        plan: the order of the run and why, for the run record.
    """

    entry: PruningEntry
    names: dict[torch.nn.Module, str]
    patterns: dict[str, Pattern]
    quantizer: Quantizer
    processes: Processes
    experts: ExpertReport
    resume: Resume
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    masters: dict[str, torch.Tensor] = field(default_factory=dict)
    plan: dict[str, str] = field(default_factory=dict)
    _progress: Any = None
    _start: float = 0.0
    _seconds: float = 0.0

    @property
    def doing(self) -> str:
        """Return what the run does, for messages."""
        return "pruning" if self.entry.prunes else "quantizing"

    def begin(self) -> None:
        """Begin the times and the progress bar."""
        self._start = time.monotonic()
        shown, restored = self.processes.is_first, len(self.resume.names)
        self._progress = StepProgress(self.doing, len(self.names), restored, shown=shown)

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
        self.experts.use_order(order, why)
        logger.info(f"{self.doing} {order} by {order} ({why})")

    def has_pruned(self, modules: Sequence[torch.nn.Module]) -> bool:
        """Return whether a killed run has pruned all of these modules."""
        return self.resume.has([self.names[module] for module in modules])

    def restore(self, modules: Sequence[torch.nn.Module]) -> None:
        """Restore the pruned weights of these modules from the earlier run."""
        self.processes.meet()  # until now, ranks with shared memory may read dense weights
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
        return {
            "order": self.plan,
            "preset": self.entry.preset,
            **self.experts.record(),
            "time": {"seconds": self._seconds},
            "modules": [self.records[n] for n in self.names.values() if n in self.records],
        }


def solve_problems(
    entry: PruningEntry,
    problems: Sequence[Problem],
    grids: Sequence[Sequence[Grid | None]],
    dtype: torch.dtype,
) -> list[list[tuple[Solution, Quantized | None]]]:
    """Prune the modules of each problem; round those with a grid to `dtype`."""
    solved = solve_many(
        entry.solver,
        problems,
        dampening_frac=entry.dampening_frac,
        refit=entry.refit,
        iterations=entry.iterations,
        refit_steps=entry.refit_steps,
        keep_factor=entry.quantization is not None,
    )
    if entry.quantization is None:
        return [[(solution, None) for solution in solutions] for solutions in solved]
    rounded = quantize_many(
        [
            PrunedProblem(solutions, problem.hessian, of_modules)
            for solutions, problem, of_modules in zip(solved, problems, grids, strict=True)
        ],
        dtype=dtype,
        dampening_frac=entry.dampening_frac,
    )
    return [list(zip(*pair, strict=True)) for pair in zip(solved, rounded, strict=True)]


def solve_groups(
    entry: PruningEntry,
    groups: Sequence[InputGroup],
    names: Mapping[torch.nn.Module, str],
    patterns: Mapping[str, Pattern],
    quantizer: Quantizer,
) -> list[list[Pruned]]:
    """Prune, and quantize if asked for, the modules of each group; none is changed."""
    with contextlib.ExitStack() as stack:
        for module in (module for group in groups for module in group.modules):
            stack.enter_context(align_module_device(module))
        dtype = groups[0].modules[0].get_parameter("weight").dtype
        problems, grids = [], []
        for group in groups:
            labels = [names[module] for module in group.modules]
            weights: list[torch.Tensor] = [m.get_parameter("weight") for m in group.modules]
            if entry.quantization is not None:  # which rounds to their dtype later
                weights = [weight.float() for weight in weights]
            hessian = group.statistics.hessian.matrix(labels[0], take=True)
            cross_moment = group.statistics.cross_moment(take=True)
            pattern = [patterns[label] for label in labels]
            problems.append(Problem(weights, hessian, pattern, labels, cross_moment))
            grids.append([quantizer.grids.get(module) for module in group.modules])
        solved = solve_problems(entry, problems, grids, dtype)
        return [
            [
                _pruned(entry, solution, result, group, quantizer, module)
                for module, (solution, result) in zip(group.modules, solutions, strict=True)
            ]
            for group, solutions in zip(groups, solved, strict=True)
        ]


def _pruned(
    entry: PruningEntry,
    solution: Solution,
    result: Quantized | None,
    group: InputGroup,
    quantizer: Quantizer,
    module: torch.nn.Module,
) -> Pruned:
    """Return a module's result with its record."""
    record = solution.record() | {"tokens": group.statistics.hessian.tokens}
    if group.statistics.capped:
        record["capped_tokens"] = group.statistics.capped
    if result is None:
        return Pruned(record, solution.weight.to(module.get_parameter("weight").dtype))
    record["relative_error_before_rounding"] = record["relative_error"]
    record["relative_error"] = result.relative_error
    if entry.prunes:
        record["sparsity"] = float((result.weight == 0).float().mean())
    else:  # codes of zero are values like others
        del record["sparsity"]
    record["quantization"] = quantizer.described[solution.name]
    master = None
    if entry.recover is not None:
        grid = quantizer.grids[module]
        codes = codes_of(result.weight, result.scale, grid, result.zero_point)
        master = master_in_cell(codes, result.scale, grid, solution.weight).cpu()
    return Pruned(record, result.weight, result.scale, result.zero_point, master)


def solve_on_all_ranks(
    groups: Sequence[InputGroup],
    names: Mapping[torch.nn.Module, str],
    processes: Processes,
    solve: Callable[[Sequence[InputGroup]], list[list[Pruned]]],
    per_call: Callable[[InputGroup], int],
) -> Iterator[tuple[InputGroup, list[Pruned]]]:
    """Yield each group with its pruned modules: the same bits for any rank count.

    Neighbours of one shape are solved in one call, `per_call` of them. The ranks'
    statistics are added up (shard_sum.py), each call is solved on one rank, and its result
    is sent to the others, after all have solved, because weights may be shared memory.

    Raises:
        RacError: the ranks have calibrated different modules.
    """
    if processes.count > 1:
        processes.meet()
        check_same_groups(groups, names, processes)
    for group in groups:
        group.statistics.finish()
    calls: list[list[InputGroup]] = []
    for _, same_shape in groupby(groups, lambda g: [module.weight.shape for module in g.modules]):
        alike = list(same_shape)
        step = per_call(alike[0])
        calls += [alike[i : i + step] for i in range(0, len(alike), step)]
    return_freed_memory()
    if processes.count == 1:
        for call in calls:
            yield from zip(call, solve(call), strict=True)
        return
    sizes = [
        sum(m.get_parameter("weight").numel() for group in call for m in group.modules)
        for call in calls
    ]
    # the largest call first, to the rank with the fewest weights so far
    rank_of: dict[int, int] = greedy_bin_packing(
        list(range(len(calls))), processes.count, lambda i: sizes[i]
    )[2]
    results: dict[torch.nn.Module, Pruned] = {}
    for i, call in enumerate(calls):
        if rank_of[i] == processes.rank:
            for group, pruned in zip(call, solve(call), strict=True):
                results |= zip(group.modules, pruned, strict=True)
    processes.meet()
    for i, call in enumerate(calls):
        for group in call:
            mine = [results.get(module) for module in group.modules]
            yield group, _broadcast(mine, rank_of[i], processes)


def problems_per_call(
    modules: Sequence[torch.nn.Module], device: torch.device, entry: PruningEntry
) -> int:
    """Return how many groups of this shape a solver call takes, for speed."""
    if not entry.gains_at_once:
        return 1
    shapes = [tuple(module.weight.shape) for module in modules]  # type: ignore[arg-type]
    return sparsegpt.problems_per_batch(shapes[0][1], sum(rows for rows, _ in shapes), device)


def _broadcast(results: Sequence[Pruned | None], source: int, processes: Processes) -> list[Pruned]:
    """Return on every rank the results of the rank `source`."""
    about = [
        result and [result.record, {n: [*t.shape, str(t.dtype)] for n, t in result.tensors.items()}]
        for result in results
    ]
    received = []
    for result, (record, forms) in zip(results, processes.from_all(about)[source], strict=True):
        tensors: dict[str, torch.Tensor] = {}
        for name, (*shape, dtype) in forms.items():
            kind = getattr(torch, dtype.removeprefix("torch."))
            empty = torch.empty(shape, dtype=kind, device=processes.device)
            tensor = processes.send(getattr(result, name, empty), source)
            tensors[name] = tensor.cpu() if name == "master" else tensor
        received.append(Pruned(record, **tensors))
    return received
