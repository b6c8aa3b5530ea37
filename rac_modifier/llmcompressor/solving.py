"""From the statistics of a group to its pruned modules: in one process, or each group in one of several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from compressed_tensors.distributed import greedy_bin_packing
from compressed_tensors.utils import align_module_device

from rac_modifier.errors import RacError
from rac_modifier.freed_memory import return_freed_memory
from rac_modifier.llmcompressor.input_groups import InputGroup
from rac_modifier.llmcompressor.quantizer import GroupQuantizer
from rac_modifier.processes import Processes
from rac_modifier.pruning import sparsegpt
from rac_modifier.pruning.solve import Problem, Solution, solve_many
from rac_modifier.quantization.solve import PrunedProblem, Quantized, quantize_many
from rac_modifier.recovery.cells import codes_of, master_in_cell
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern


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


Solve = Callable[[Sequence[InputGroup]], list[list[Pruned]]]


def solve_groups(
    entry: PruningEntry,
    groups: Sequence[InputGroup],
    names: Mapping[torch.nn.Module, str],
    patterns: Mapping[str, Pattern],
    quantizer: GroupQuantizer | None,
) -> list[list[Pruned]]:
    """Prune the modules of each group, and quantize them if the recipe says so. The modules themselves are not changed."""
    with contextlib.ExitStack() as stack:
        for module in (module for group in groups for module in group.modules):
            stack.enter_context(align_module_device(module))
        problems = []
        for group in groups:
            labels = [names[module] for module in group.modules]
            weights: list[torch.Tensor] = [module.weight for module in group.modules]  # type: ignore[misc]
            problem = Problem(
                [w.float() for w in weights]
                if quantizer
                else weights,  # quantization rounds to their dtype later
                group.statistics.hessian.matrix(labels[0], take=True),
                [patterns[label] for label in labels],
                labels,
                group.statistics.cross_moment(take=True),
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
            keep_factor=quantizer is not None,
        )
        rounded: list[list[Quantized | None]] = [[None] * len(solutions) for solutions in solved]
        if quantizer is not None and entry.quantization is not None:
            rounded = quantize_many(
                [
                    PrunedProblem(
                        solutions,
                        problem.hessian,
                        [quantizer.grids.get(module) for module in group.modules],
                    )
                    for group, solutions, problem in zip(groups, solved, problems, strict=True)
                ],
                dtype=groups[0].modules[0].get_parameter("weight").dtype,
                dampening_frac=entry.dampening_frac,
                sweeps=entry.quantization.sweeps,
            )
        return [
            _results(entry, *one, quantizer) for one in zip(groups, solved, rounded, strict=True)
        ]


def _results(
    entry: PruningEntry,
    group: InputGroup,
    solutions: Sequence[Solution],
    rounded: Sequence[Quantized | None],
    quantizer: GroupQuantizer | None,
) -> list[Pruned]:
    """The results for the modules of a group, in their dtype, quantized if the recipe says so."""
    modules = group.modules
    dtypes: list[torch.dtype] = [module.weight.dtype for module in modules]  # type: ignore[misc]
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
            codes = codes_of(
                result.weight, result.scale, quantizer.grids[module], result.zero_point
            )
            master = master_in_cell(
                codes, result.scale, quantizer.grids[module], solution.weight
            ).cpu()
        found.append(Pruned(result.weight, record, result.scale, master, result.zero_point))
    return found


def end_lanes(
    groups: Sequence[InputGroup],
    names: Mapping[torch.nn.Module, str],
    processes: Processes,
    count: int,
) -> None:
    """So many lanes of the calibration set have ended, in all processes, for the statistics of each group.

    Raises:
        RacError: the processes have calibrated other modules.
    """
    for _ in range(count):
        _check_same(groups, names, processes)
        for group in groups:
            group.statistics.end_lanes(1, processes)


def solve_together(
    groups: Sequence[InputGroup],
    names: Mapping[torch.nn.Module, str],
    processes: Processes,
    solve: Solve,
    gains_at_once: bool,
    together: int | None = None,
) -> Iterator[tuple[InputGroup, list[Pruned]]]:
    """The modules of each group, pruned; in all processes the same, and with any number of processes the same bits.

    Small groups of one shape that follow each other are solved at once where that saves time, `together` of them. Of
    several processes, each has the statistics of its share of the calibration set. These are added up (lane_sum.py), each group
    is solved in one process as it is where there is only one, and the result is sent to the others. The modules of a group stay
    together: with fewer rows, products may be rounded otherwise. No process has the results of a group before each has
    solved all that it has to of `groups`, so their weights may be shared memory.

    Raises:
        RacError: the processes have calibrated other modules.
    """
    if processes.count > 1:
        processes.meet()
        _check_same(groups, names, processes)
    for group in groups:
        group.statistics.finish(processes)
    units = list(_units(groups, gains_at_once, together))
    return_freed_memory()
    if processes.count == 1:
        for unit in units:
            yield from zip(unit, solve(unit), strict=True)
        return
    owner = owners([_weights(unit) for unit in units], processes.count)
    solved: dict[torch.nn.Module, Pruned] = {}
    for unit, rank in zip(units, owner, strict=True):
        if rank == processes.rank:
            for group, found in zip(unit, solve(unit), strict=True):
                solved |= zip(group.modules, found, strict=True)
    processes.meet()
    for unit, rank in zip(units, owner, strict=True):
        for group in unit:
            yield group, _sent(group.modules, solved, rank, processes)


def at_once(modules: Sequence[torch.nn.Module], device: torch.device, gains: bool) -> int:
    """How many groups of this shape are solved at once, where their solver `gains` by it."""
    shapes = [tuple(module.weight.shape) for module in modules]  # type: ignore[arg-type]
    return sparsegpt.at_once(shapes[0][1], sum(rows for rows, _ in shapes), device) if gains else 1


def _units(
    groups: Sequence[InputGroup], gains_at_once: bool, together: int | None
) -> Iterator[list[InputGroup]]:
    """The groups in their order; together those that follow each other, have one shape and are solved at once."""
    for _, alike in groupby(
        groups, lambda group: [module.weight.shape for module in group.modules]
    ):
        some = list(alike)
        step = together or at_once(
            some[0].modules, some[0].statistics.hessian.device, gains_at_once
        )
        yield from (some[i : i + step] for i in range(0, len(some), step))


def _weights(groups: Sequence[InputGroup]) -> int:
    return sum(
        module.get_parameter("weight").numel() for group in groups for module in group.modules
    )


def owners(sizes: Sequence[int], count: int) -> list[int]:
    """Which process solves what has so many weights: the largest first, each where there are fewest weights so far."""
    place: dict[int, int] = greedy_bin_packing(list(range(len(sizes))), count, lambda i: sizes[i])[
        2
    ]
    return [place[i] for i in range(len(sizes))]


def _check_same(
    groups: Sequence[InputGroup], names: Mapping[torch.nn.Module, str], processes: Processes
) -> None:
    first, *others = processes.from_all(
        [[names[module] for module in group.modules] for group in groups]
    )
    for rank, other in enumerate(others, 1):
        if other != first:
            ours, theirs = ({name for group in part for name in group} for part in (first, other))
            only = sorted(ours ^ theirs) or ["the same modules in other groups"]
            raise RacError(
                f"process 0 and process {rank} have not calibrated the same modules ({', '.join(only[:3])}): some got no token "
                "of the share of one of them. Add them to ignore, calibrate on more tokens, or start fewer processes"
            )


def _sent(
    modules: Sequence[torch.nn.Module],
    solved: Mapping[torch.nn.Module, Pruned],
    source: int,
    processes: Processes,
) -> list[Pruned]:
    """The results of a group that the process `source` has solved, in all processes."""
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
        mine = solved.get(module)
        like: torch.Tensor = module.weight.detach()  # type: ignore[operator]

        def send(tensor: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Any:
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
