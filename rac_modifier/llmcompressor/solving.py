"""From the statistics of groups to their pruned modules, on one rank or each group on one of several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from compressed_tensors.distributed import greedy_bin_packing
from compressed_tensors.utils import align_module_device

from rac_modifier.llmcompressor.quantizer import NoQuantizer
from rac_modifier.llmcompressor.statistics import InputGroup, check_same_groups
from rac_modifier.platform import return_freed_memory
from rac_modifier.processes import Processes
from rac_modifier.pruning import sparsegpt
from rac_modifier.pruning.hessian import Statistics
from rac_modifier.pruning.solve import Problem, Solution, solve_many
from rac_modifier.quantization.grid import Grid
from rac_modifier.quantization.solve import PrunedProblem, Quantized, quantize_many
from rac_modifier.recovery.cells import codes_of, master_in_cell
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern


@dataclass(frozen=True)
class Pruned:
    """A pruned module, as it is stored.

    Attributes:
        weight: [rows, columns] in the dtype of the module.
        record: its entry of the run record.
        scale: of the rounded weight; None where it is not rounded.
        zero_point: int8, in the shape of the scales, of a weight rounded to an asymmetric grid; else None.
        master: float32 [rows, columns] on the CPU: where recovery of a rounded weight starts, within the cells of its codes, on
            the side of the weight before it was rounded; None without recovery.
    """

    weight: torch.Tensor
    record: dict[str, Any]
    scale: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None
    master: torch.Tensor | None = None


Solve = Callable[[Sequence[InputGroup]], list[list[Pruned]]]


def solve_problems(
    entry: PruningEntry,
    problems: Sequence[Problem],
    grids: Sequence[Sequence[Grid | None]],
    dtype: torch.dtype,
) -> list[list[tuple[Solution, Quantized | None]]]:
    """Prune the modules of each problem as the recipe says, and round those that have a grid to `dtype`."""
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
    quantizer: NoQuantizer,
) -> list[list[Pruned]]:
    """Prune the modules of each group, and quantize them if the recipe says so. The modules themselves are not changed."""
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
                _pruned(entry, solution, result, group.statistics, module, quantizer)
                for module, (solution, result) in zip(group.modules, solutions, strict=True)
            ]
            for group, solutions in zip(groups, solved, strict=True)
        ]


def _pruned(
    entry: PruningEntry,
    solution: Solution,
    result: Quantized | None,
    statistics: Statistics,
    module: torch.nn.Module,
    quantizer: NoQuantizer,
) -> Pruned:
    """Return a module's result with its record."""
    record = solution.record() | {"tokens": statistics.hessian.tokens}
    if statistics.capped:
        record["capped_tokens"] = statistics.capped
    if result is None:
        return Pruned(solution.weight.to(module.get_parameter("weight").dtype), record)
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
    return Pruned(result.weight, record, result.scale, result.zero_point, master)


def solve_on_all_ranks(
    groups: Sequence[InputGroup],
    names: Mapping[torch.nn.Module, str],
    processes: Processes,
    solve: Solve,
    per_call: Callable[[InputGroup], int],
) -> Iterator[tuple[InputGroup, list[Pruned]]]:
    """Yield each group with its pruned modules: the same on all ranks, and with any number of ranks the same bits.

    Groups of one shape that follow each other are solved in one call, `per_call` of them. Each rank has the statistics of its
    share of the calibration set: they are added up (shard_sum.py), each group is solved on one rank as it is where there is only
    one, and the result is sent to the others. The modules of a group stay together: with fewer rows, matmuls may be rounded
    otherwise. No rank gets a result before each has solved its groups, so weights may be shared memory.

    Raises:
        RacError: the ranks have calibrated different modules.
    """
    if processes.count > 1:
        processes.meet()
        check_same_groups(groups, names, processes)
    for group in groups:
        group.statistics.finish()
    calls = list(_calls(groups, per_call))
    return_freed_memory()
    if processes.count == 1:
        for call in calls:
            yield from zip(call, solve(call), strict=True)
        return
    ranks = owners([_weights(call) for call in calls], processes.count)
    results: dict[torch.nn.Module, Pruned] = {}
    for call, rank in zip(calls, ranks, strict=True):
        if rank == processes.rank:
            for group, pruned in zip(call, solve(call), strict=True):
                results |= zip(group.modules, pruned, strict=True)
    processes.meet()
    for call, rank in zip(calls, ranks, strict=True):
        for group in call:
            yield group, _broadcast(group.modules, results, rank, processes)


def problems_per_call(
    modules: Sequence[torch.nn.Module], device: torch.device, entry: PruningEntry
) -> int:
    """Return how many groups of this shape one solver call takes: several where the recipe's solver gains by that."""
    if not entry.gains_at_once:
        return 1
    shapes = [tuple(module.weight.shape) for module in modules]  # type: ignore[arg-type]
    return sparsegpt.problems_per_batch(shapes[0][1], sum(rows for rows, _ in shapes), device)


def owners(sizes: Sequence[int], count: int) -> list[int]:
    """Return the rank that solves each call, by its number of weights: the largest first, to the rank with the fewest so far."""
    numbers = list(range(len(sizes)))
    place: dict[int, int] = greedy_bin_packing(numbers, count, lambda i: sizes[i])[2]
    return [place[i] for i in numbers]


def _calls(
    groups: Sequence[InputGroup], per_call: Callable[[InputGroup], int]
) -> Iterator[list[InputGroup]]:
    """Yield the groups of each solver call: neighbours of one shape."""
    for _, same_shape in groupby(groups, lambda g: [module.weight.shape for module in g.modules]):
        alike = list(same_shape)
        step = per_call(alike[0])
        yield from (alike[i : i + step] for i in range(0, len(alike), step))


def _weights(groups: Sequence[InputGroup]) -> int:
    return sum(m.get_parameter("weight").numel() for group in groups for m in group.modules)


def _broadcast(
    modules: Sequence[torch.nn.Module],
    results: Mapping[torch.nn.Module, Pruned],
    source: int,
    processes: Processes,
) -> list[Pruned]:
    """Return on every rank the results of a group that the rank `source` has solved."""
    mine = [results.get(module) for module in modules]
    about = processes.from_all([_about(result) for result in mine])[source]
    received = []
    for module, result, said in zip(modules, mine, about, strict=True):
        weight = module.get_parameter("weight").detach()
        like = {
            "weight": (list(weight.shape), weight.dtype),
            "scale": (said["scale"], weight.dtype),
            "zero_point": (said["zero_point"], torch.int8),
            "master": (said["master"], torch.float32),
        }
        tensors: dict[str, Any] = {}
        for name, (shape, dtype) in like.items():
            if shape is not None:
                empty = torch.empty(shape, dtype=dtype, device=processes.device)
                tensor = empty if result is None else getattr(result, name)
                tensors[name] = processes.send(tensor, source)
        if "master" in tensors:
            tensors["master"] = tensors["master"].cpu()
        received.append(Pruned(record=said["record"], **tensors))
    return received


def _about(result: Pruned | None) -> dict[str, Any] | None:
    """Return the record and the shapes of a result, as JSON."""
    if result is None:
        return None
    parts = {name: getattr(result, name) for name in ("scale", "zero_point", "master")}
    shapes = {name: None if part is None else list(part.shape) for name, part in parts.items()}
    return {"record": result.record, **shapes}
