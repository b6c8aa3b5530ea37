"""Prune groups from their statistics."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.utils import align_module_device
from torch import Tensor

from rac_modifier.formats.encoding import used_scale
from rac_modifier.llmcompressor.quantizer import Quantizer
from rac_modifier.llmcompressor.statistics import InputGroup
from rac_modifier.pruning.problem import Problem, SolverOptions
from rac_modifier.pruning.solve import Solution, solve_many
from rac_modifier.quantization.solve import Quantized, quantize_many
from rac_modifier.recovery.on_grid import codes_of, master_in_cell
from rac_modifier.settings.entries import PruningEntry
from rac_modifier.settings.pattern import Pattern


@dataclass(frozen=True)
class Pruned:
    """Hold a pruned module, as it is stored, and the `master` that recovery starts from."""

    record: dict[str, Any]  # its entry of the run record
    weight: Tensor  # [rows, columns] in the dtype of the module
    scale: Tensor | None = None  # of a rounded weight
    zero_point: Tensor | None = None  # int8, of an asymmetric grid
    global_scale: Tensor | None = None  # float32 [1], of NVFP4
    master: Tensor | None = None  # float32 [rows, columns] on the CPU

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by attribute."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}


def solver_options(entry: PruningEntry) -> SolverOptions:
    """Return what the recipe says of the solver; it decides what the solver's work takes."""
    return SolverOptions(
        entry.solver,
        entry.dampening_frac,
        entry.refit,
        entry.iterations,
        keep_factor=entry.quantization is not None,
    )


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
        problems = []
        for group in groups:
            labels = [names[module] for module in group.modules]
            weights: list[Tensor] = [m.get_parameter("weight") for m in group.modules]
            if entry.quantization is not None:  # which rounds to their dtype later
                weights = [weight.float() for weight in weights]
            hessian = group.statistics.hessian.take(labels[0])
            cross_moment = group.statistics.take_cross_moment()
            pattern = [patterns[label] for label in labels]
            tokens = group.statistics.hessian.tokens
            problems.append(Problem(weights, hessian, pattern, labels, cross_moment, tokens))
        solved = solve_many(problems, solver_options(entry))
        rounded: list[list[Quantized | None]] = [[None] * len(group.modules) for group in groups]
        if entry.quantization is not None:
            grids = [[quantizer.grids.get(module) for module in group.modules] for group in groups]
            hessians, frac = [problem.hessian for problem in problems], entry.dampening_frac
            rounded = quantize_many(solved, hessians, grids, dtype=dtype, dampening_frac=frac)
        return [
            [
                _pruned(entry, solution, result, group, quantizer, module)
                for module, solution, result in zip(group.modules, s, r, strict=True)
            ]
            for group, s, r in zip(groups, solved, rounded, strict=True)
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
        scale = used_scale(result.scale, result.global_scale)
        codes = codes_of(result.weight, scale, grid, result.zero_point)
        master = master_in_cell(codes, scale, grid, solution.weight).cpu()
    of_result = (result.weight, result.scale, result.zero_point, result.global_scale)
    return Pruned(record, *of_result, master)
