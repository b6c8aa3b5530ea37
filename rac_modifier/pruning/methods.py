"""The pruning methods behind one signature: a `Problem` in, a `Pruned` out; `METHODS` is the one list of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rac_modifier.pruning import alps, sparsegpt
from rac_modifier.pruning.scores import magnitude_mask, wanda_mask
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import Method


@dataclass(frozen=True)
class Settings:
    """What a user sets; each method reads its own."""

    dampening_frac: float
    block_size: int
    iterations: int


@dataclass(frozen=True)
class Problem:
    """Modules that read the same input, side by side and transposed; sparsegpt.py says why.

    Attributes:
        weight: [d, sum(rows)], the target in the Hessian's dtype; the method prunes it in place.
        rows: how many columns of `weight` belong to each module.
        hessian: [d, d], read only.
        dead: bool [d], inputs that are 0 on every token.
        patterns: one a module; the same N:M for all, or all unstructured.
        label: the modules' names, for messages.
        factor: of `hessian` with the dampening of `settings`, when somebody has it already.
        zeros: bool like `weight`, where the modules' own weights are 0 already; only for "keep".
    """

    weight: torch.Tensor
    rows: Sequence[int]
    hessian: torch.Tensor
    dead: torch.Tensor
    patterns: Sequence[Pattern]
    settings: Settings
    label: str
    factor: sparsegpt.Factor | None = None
    zeros: torch.Tensor | None = None


@dataclass(frozen=True)
class Pruned:
    """The mask of what was pruned, bool like the weight, and how it went.

    `errors`: each row's error, float64, from a method that knows it anyway.
    """

    mask: torch.Tensor
    errors: torch.Tensor | None = None
    dampening_frac: float = 0.0
    retries: int = 0
    iterations: int = 0


def _sparsegpt(problem: Problem) -> Pruned:
    settings, weight = problem.settings, problem.weight
    factor = problem.factor or sparsegpt.factorise(problem.hessian, settings.dampening_frac, problem.label)
    weight[problem.dead] = 0.0
    mask, errors = sparsegpt.prune(weight, factor, problem.rows, problem.patterns, settings.block_size)
    mask[problem.dead] = True
    return Pruned(mask, errors, factor.dampening_frac, factor.retries)


def _alps(problem: Problem) -> Pruned:
    settings, weight = problem.settings, problem.weight
    weight[problem.dead] = 0.0
    given = problem.factor  # which says how much dampening this Hessian needs
    support = alps.prune(
        weight,
        problem.hessian,
        problem.rows,
        problem.patterns,
        iterations=settings.iterations,
        dampening_frac=given.dampening_frac if given else settings.dampening_frac,
        label=problem.label,
    )
    retries = support.retries + (given.retries if given else 0)
    support.pruned[problem.dead] = True
    return Pruned(support.pruned, None, support.dampening.frac, retries, settings.iterations)


def _wanda(problem: Problem) -> Pruned:
    return _by_score(problem, lambda weight, pattern: wanda_mask(weight, problem.hessian, pattern))


def _magnitude(problem: Problem) -> Pruned:
    return _by_score(problem, magnitude_mask)


def _keep(problem: Problem) -> Pruned:
    """The zeros of a model that is sparse already."""
    assert problem.zeros is not None
    mask = problem.zeros | problem.dead.unsqueeze(1)
    problem.weight.masked_fill_(mask, 0.0)
    return Pruned(mask)


def _by_score(problem: Problem, choose: Callable[[torch.Tensor, Pattern], torch.Tensor]) -> Pruned:
    """`choose` sees each module by itself, [rows, d], and says what to prune; nothing else changes."""
    modules = problem.weight.split(list(problem.rows), dim=1)
    parts = zip(modules, problem.patterns, strict=True)
    mask = torch.cat([choose(part.T.contiguous(), pattern) for part, pattern in parts]).T
    problem.weight.masked_fill_(mask, 0.0)
    return Pruned(mask)


METHODS: dict[Method, Callable[[Problem], Pruned]] = {
    "sparsegpt": _sparsegpt,
    "alps": _alps,
    "wanda": _wanda,
    "magnitude": _magnitude,
    "keep": _keep,
}
