"""From the statistics of a group to its pruned modules: in one process, or each module in one of several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from compressed_tensors.distributed import greedy_bin_packing
from compressed_tensors.utils import align_module_device

from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.input_groups import InputGroup
from rac_modifier.llmcompressor.quantizer import GroupQuantizer
from rac_modifier.processes import Processes
from rac_modifier.pruning import sparsegpt
from rac_modifier.pruning.solve import Problem, Solution, solve_many
from rac_modifier.quantization.solve import Quantized, quantize
from rac_modifier.recovery.cells import codes_of, master_in_cell
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import Method


@dataclass(frozen=True)
class Pruned:
    """What becomes of a module.

    Attributes:
        weight: [rows, columns] in the dtype of the module.
        record: its entry of the run record.
        scale: of the rounded weight, None where it is not rounded.
        master: float32 [rows, columns] on the CPU, where recovery of a rounded weight starts: within the cells of its codes,
            on the side of the weight before it was rounded.
        zero_point: int8, in the shape of the scales, of a weight rounded to an asymmetric grid.
    """

    weight: torch.Tensor
    record: dict[str, Any]
    scale: torch.Tensor | None = None
    master: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None


Part = tuple[InputGroup, Sequence[torch.nn.Module]]  # a group, and those of its modules that are solved here
Solve = Callable[[Sequence[Part]], list[list[Pruned]]]


def solve_groups(
    entry: PruningEntry,
    parts: Sequence[Part],
    names: Mapping[torch.nn.Module, str],
    patterns: Mapping[str, Pattern],
    quantizer: GroupQuantizer | None,
) -> list[list[Pruned]]:
    """Prune some modules of each group, and quantize them if the recipe says so. The modules themselves are not changed."""
    with contextlib.ExitStack() as stack:
        for module in (module for _, modules in parts for module in modules):
            stack.enter_context(align_module_device(module))
        problems = []
        for group, modules in parts:
            labels = [names[module] for module in modules]
            weights: list[torch.Tensor] = [module.weight for module in modules]  # type: ignore[misc]
            problem = Problem(
                [w.float() for w in weights] if quantizer else weights,  # quantization rounds to their dtype later
                group.statistics.hessian.matrix(labels[0]),
                [patterns[label] for label in labels],
                labels,
                group.statistics.cross_moment([group.modules.index(module) for module in modules]),
            )
            problems.append(problem)
        solved = solve_many(
            entry.solver,
            problems,
            dampening_frac=entry.dampening_frac,
            block_size=entry.block_size,
            refit=entry.refit,
            iterations=entry.iterations,
            refit_steps=entry.refit_steps,
        )
        return [
            _rounded(entry, part, solutions, problem.hessian, quantizer)
            for part, solutions, problem in zip(parts, solved, problems, strict=True)
        ]


def _rounded(
    entry: PruningEntry,
    part: Part,
    solutions: Sequence[Solution],
    hessian: torch.Tensor,
    quantizer: GroupQuantizer | None,
) -> list[Pruned]:
    """The results for the modules of a group, in their dtype, quantized if the recipe says so."""
    group, modules = part
    dtypes: list[torch.dtype] = [module.weight.dtype for module in modules]  # type: ignore[misc]
    rounded: list[Quantized | None] = [None] * len(solutions)
    if quantizer is not None and entry.quantization is not None:
        rounded = quantize(
            solutions,
            hessian,
            [quantizer.grids.get(module) for module in modules],
            dtype=dtypes[0],
            dampening_frac=entry.dampening_frac,
            sweeps=entry.quantization.sweeps,
        )
    found = []
    for module, solution, result in zip(modules, solutions, rounded, strict=True):
        record = solution.record() | {"tokens": group.statistics.hessian.tokens}
        if quantizer is None or result is None:
            found.append(Pruned(solution.weight.to(dtypes[0]), record))
            continue
        record["relative_error_before_rounding"] = record["relative_error"]
        record["relative_error"] = result.relative_error
        if entry.prunes:
            record["sparsity"] = float((result.weight == 0).float().mean())
        else:  # codes of zero are values like others
            del record["sparsity"]
        record["quantization"] = quantizer.described[solution.name]
        master = None
        if entry.recover is not None:
            codes = codes_of(result.weight, result.scale, quantizer.grids[module], result.zero_point)
            master = master_in_cell(codes, result.scale, quantizer.grids[module], solution.weight).cpu()
        found.append(Pruned(result.weight, record, result.scale, master, result.zero_point))
    return found


def solve_together(
    groups: Sequence[InputGroup],
    names: Mapping[torch.nn.Module, str],
    processes: Processes,
    solve: Solve,
    solver: Method,
) -> Iterator[tuple[InputGroup, list[Pruned]]]:
    """The modules of each group, pruned; in all processes the same.

    One process solves group after group, and small ones of one shape at once where `solver` gains by it. Of several, each has the
    statistics of its share of the calibration set. These are added up, each module is solved in one process, as upstream's GPTQ
    does it, and the result is sent to the others. No process has the results of a group before each has solved all that it has to
    of `groups`, so their weights may be shared memory.

    Raises:
        RacError: the processes have calibrated other modules.
    """
    if processes.count == 1:
        for parts in _in_turn([(group, group.modules) for group in groups], solver):
            yield from zip((group for group, _ in parts), solve(parts), strict=True)
        return
    processes.meet()
    _check_same([[names[module] for module in group.modules] for group in groups], processes)
    for group in groups:
        group.statistics.gather(processes)
    owner = owners([module for group in groups for module in group.modules], processes.count)
    solved: dict[torch.nn.Module, Pruned] = {}
    mine = [(group, [module for module in group.modules if owner[module] == processes.rank]) for group in groups]
    for parts in _in_turn([part for part in mine if part[1]], solver):
        for (_, own), found in zip(parts, solve(parts), strict=True):
            solved |= zip(own, found, strict=True)
    processes.meet()
    for group in groups:
        yield group, _sent(group.modules, solved, owner, processes)


def at_once(modules: Sequence[torch.nn.Module], device: torch.device, solver: Method) -> int:
    """How many groups of this shape are solved at once."""
    shapes = [tuple(module.weight.shape) for module in modules]  # type: ignore[arg-type]
    return sparsegpt.at_once(shapes[0][1], sum(rows for rows, _ in shapes), device) if solver == "sparsegpt" else 1


def _in_turn(parts: Iterable[Part], solver: Method) -> Iterator[list[Part]]:
    """The parts in their order; together those that follow each other, have one shape and are solved at once."""
    for _, group in groupby(parts, lambda part: [module.weight.shape for module in part[1]]):
        alike = list(group)
        step = at_once(alike[0][1], alike[0][0].statistics.hessian.device, solver)
        yield from (alike[i : i + step] for i in range(0, len(alike), step))


def owners(modules: Sequence[torch.nn.Module], count: int) -> dict[torch.nn.Module, int]:
    """Which process solves which module: the largest first, each where there are fewest weights so far."""
    return greedy_bin_packing(list(modules), count, lambda module: module.weight.numel())[2]


def _check_same(calibrated: list[list[str]], processes: Processes) -> None:
    first, *others = processes.from_all(calibrated)
    for rank, other in enumerate(others, 1):
        if other != first:
            names, theirs = ({name for group in groups for name in group} for groups in (first, other))
            only = sorted(names ^ theirs) or ["the same modules in other groups"]
            raise RacError(
                f"process 0 and process {rank} have not calibrated the same modules ({', '.join(only[:3])}): some got no token "
                "of the share of one of them. Add them to ignore, calibrate on more tokens, or start fewer processes"
            )


def _sent(
    modules: Sequence[torch.nn.Module],
    solved: Mapping[torch.nn.Module, Pruned],
    owner: Mapping[torch.nn.Module, int],
    processes: Processes,
) -> list[Pruned]:
    """The results of a group, in all processes."""
    own = {
        str(i): {
            "record": solved[module].record,
            "scale": None if (scale := solved[module].scale) is None else list(scale.shape),
            "zero_point": solved[module].zero_point is not None,
            "master": solved[module].master is not None,
        }
        for i, module in enumerate(modules)
        if module in solved
    }
    about = {int(i): one for part in processes.from_all(own) for i, one in part.items()}
    found = []
    for i, module in enumerate(modules):
        mine, source = solved.get(module), owner[module]
        like: torch.Tensor = module.weight.detach()  # type: ignore[operator]

        def send(tensor: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype, source: int = source) -> Any:
            empty = torch.empty(shape, dtype=dtype, device=processes.device)
            return processes.send(empty if tensor is None else tensor, source)

        scale, master, zero_point = None, None, None
        weight = send(mine.weight if mine else None, like.shape, like.dtype)
        if about[i]["scale"] is not None:
            scale = send(mine.scale if mine else None, about[i]["scale"], like.dtype)
        if about[i]["zero_point"]:
            zero_point = send(mine.zero_point if mine else None, about[i]["scale"], torch.int8)
        if about[i]["master"]:
            master = send(mine.master if mine else None, like.shape, torch.float32).cpu()
        found.append(Pruned(weight, about[i]["record"], scale, master, zero_point))
    return found
