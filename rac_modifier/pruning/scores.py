"""Solvers that score every weight once, or prune what is given: they move no weight."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rac_modifier.pruning.linalg import stacked
from rac_modifier.pruning.masks import lowest, lowest_along
from rac_modifier.pruning.problem import Masked, SolverOptions, Target
from rac_modifier.settings.pattern import Pattern


def prune(targets: Sequence[Target], options: SolverOptions) -> list[Masked]:
    """Prune each problem by the scores of `options.solver`; "keep" and "none" need none."""
    return [_MASKED[options.solver](target) for target in targets]


def _wanda(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """Prune by |W_ij| * ||X_j||_2, compared within an output row (arXiv 2306.11695, equation 1).

    Unstructured: the floor(d * sparsity) lowest of each row; N:M: the N lowest of each group.
    """
    # ||X_j|| = sqrt(H_jj) up to a factor that changes no comparison
    scores = weight.abs() * hessian.diagonal().sqrt()
    if pattern.is_structured:
        return _lowest_in_groups(scores, pattern)
    return lowest_along(scores, int(scores.shape[1] * pattern.sparsity), dim=1)


def _magnitude(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """Prune the floor(numel * sparsity) lowest |W_ij|, or the N lowest of each group."""
    if pattern.is_structured:
        return _lowest_in_groups(weight.abs(), pattern)
    return lowest(weight.abs(), int(weight.numel() * pattern.sparsity))


def _lowest_in_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    return lowest_along(scores.view(-1, pattern.m), pattern.n, dim=1).view(scores.shape)


def _scored(mask: Callable[[Tensor, Tensor, Pattern], Tensor], target: Target) -> Masked:
    """Prune by a `mask` of weight [rows, d], Hessian and pattern: True = pruned, [rows, d]."""
    weight, problem = target.start(), target.problem
    columns = weight.split(problem.rows, dim=1)
    # modules by rows: Wanda compares within an output, magnitude within a module
    masks = [
        mask(module.T.contiguous(), problem.hessian, pattern)
        for module, pattern in zip(columns, problem.patterns, strict=True)
    ]
    pruned = torch.cat(masks).T
    return Masked(target, weight.masked_fill_(pruned, 0.0), pruned, target.dampening)


def _zeros_of_the_model(target: Target) -> Masked:
    pruned = stacked(target.problem.weights, target.problem.hessian) == 0  # not of the target
    return Masked(target, target.start(), pruned, target.dampening)


def _nothing(target: Target) -> Masked:
    weight = target.start()
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    return Masked(target, weight, pruned, target.dampening)


_MASKED: dict[str, Callable[[Target], Masked]] = {
    "wanda": lambda target: _scored(_wanda, target),
    "magnitude": lambda target: _scored(_magnitude, target),
    "keep": _zeros_of_the_model,
    "none": _nothing,
}
