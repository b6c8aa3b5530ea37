"""ALPS (arXiv 2406.07831): ADMM finds which weights to keep together with their values; a refit of the kept ones follows.

The layer problem min trace((W - T) H (W - T)^T) with W in the pattern is split into W = D with D in the pattern. The
paper scales the columns of W by s_j = sqrt(H_jj), so that the diagonal of H becomes 1. Here the penalty has that scale,
rho_j = rho * H_jj, and no copy is needed. With the scaled dual U, one iteration is

    W <- T + (H + diag(rho_j))^-1 diag(rho_j) (D - U - T)
    Z <- a W + (1 - a) D + U
    D <- Z without the lowest |Z_ij| s_j that the pattern prunes
    U <- Z - D

(U is what was removed from Z to get D, so Z alone holds the state: D - U = 2 D - Z.) With a small rho W follows the data; with a
large one W and D must agree. So rho rises in a few stages, and U is rescaled with it. The stages are fixed. The paper raises
rho as the support settles, which saves choosing the stages but takes a few hundred iterations. a > 1 is over-relaxation (Boyd
et al., 2011, section 3.4.3), which the paper does not use: it is free, lowers the error by 2 % and makes rho matter less.

Two more iterations have the final mask: D keeps the same weights in both. So they are ADMM for the best values of these, with the
U and the matrix that are there already, and gain more than as many steps of the refit, which begins anew.

Four things reduce the cost.
*No eigendecomposition.* The paper diagonalises H once, to be free to change rho. That takes about 10 d^3 operations, half of
them bound by memory (on one core 131 ms for d = 768, where a Cholesky factor takes 6 ms and the inverse 13 ms more). With
few stages one factor per stage is cheaper.
*The inverse only where it pays.* It makes an iteration one product, where a factor takes products with its blocks
(platform.py), but takes three times as long to make. `multiply_adds` counts both.
*bfloat16 products* with either, on devices with units for them (linalg.py). Scaled as above, H + diag(rho_j) has no
eigenvalue below rho, so rounding changes little (0.1 % of the summed error on the reasoner's layers). A large factor is made
with them too (platform.py), unless a pivot shows that rounding spoilt it. States and inverses are float32.
*Approximate thresholds, few passes over memory.* Within the iterations an unstructured threshold comes from a sample; the last
one is exact. D is not kept: it is made of Z and the threshold, a few inputs at a time, which stay in the caches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from rac_modifier import platform
from rac_modifier.pruning import linalg
from rac_modifier.pruning.linalg import Dampening
from rac_modifier.pruning.topk import lowest, ranks_in_groups, sampled_places, sampled_threshold
from rac_modifier.settings.pattern import Pattern

# rho of the first and of the last stage, relative to the diagonal of H, and a of the equations. On the reasoner's layers at 50,
# 60, 80 % and 2:4, with 16 iterations, other pairs between 0.1 and 0.7 change the sum of the errors by -1 to +5 %; one fixed rho
# costs 24-41 % (with 12).
_RHO = (0.2, 0.5)
_RELAXATION = 1.5
_STAGE = 4  # iterations at one rho
# Iterations with the final mask. On layers of SmolLM2 at 60 %, two of them and a step of the refit leave 0.1 to 0.5 % less of the
# error than the four or five steps that it takes without them; with 1,024 instead of 8,192 tokens, 0.5 to 3 % less.
SETTLING = 2

AddSolution = Callable[[torch.Tensor, torch.Tensor], object]


def prune(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    rows: Sequence[int],
    patterns: Sequence[Pattern],
    dampening: Dampening,
    *,
    iterations: int,
    label: str,
) -> tuple[torch.Tensor, Dampening]:
    """Prune `weight` [d, sum(rows)] (transposed, the target) in place, modules of `rows` rows each side by side.

    `patterns` has one pattern per module. Unstructured: exactly floor(numel * sparsity) weights of each module, anywhere in it;
    N:M, the same for all modules: the N lowest of each group.
    Memory beside the arguments: d^2 (a matrix, then its factor or inverse in the same place, also in bfloat16), and while it
    iterates two buffers like `weight`, and three at the most while the final mask is chosen.

    Returns:
        The mask of what was pruned, bool [d, sum(rows)], and the dampening that the factorisation needed.

    Raises:
        RacError: naming `label`, when H is not positive definite even with the largest dampening.
    """
    stages, columns = _stages(iterations), weight.shape[1]
    bf16 = linalg.bf16_is_fast(hessian.device)
    add_solution, dampening = linalg.raise_until_it_works(
        lambda dampening: _solver(hessian, dampening, *stages[0], columns, bf16=bf16),
        hessian,
        dampening,
        label,
    )
    penalty = dampening.diagonal.unsqueeze(1)
    scale = penalty.sqrt()
    z, target = weight, weight.clone()
    pull = torch.empty_like(weight, dtype=torch.bfloat16 if bf16 else weight.dtype)
    before, settles, pruned = stages[0][0], sum(repeats for _, repeats in stages) - SETTLING, None
    for rho, repeats in stages:
        if rho != before:
            del add_solution  # frees its matrix before the next is made
            later = _solver(hessian, dampening, rho, repeats, columns, bf16=bf16)
            assert later is not None, "a positive definite matrix stays so when its diagonal grows"
            add_solution = later
            del later
        for _ in range(repeats):
            if settles == 0:
                del pull  # while there are scores
                pruned = _pruned(z, scale, rows, patterns)
                pull = torch.empty_like(weight, dtype=torch.bfloat16 if bf16 else weight.dtype)
            chooses = pruned is None and not patterns[0].is_structured
            above = _thresholds(z, scale, rows, patterns) if chooses else None
            for here in linalg.parts(z, max(patterns[0].m, 1)):
                keep = (
                    _keep(z[here], scale[here], patterns[0], above)
                    if pruned is None
                    else (~pruned[here]).to(z)
                )
                _pull(z[here], target[here], keep, penalty[here], pull[here], rho, before)
            before, settles = rho, settles - 1
            add_solution(z, pull)
    del add_solution, target, pull
    assert pruned is not None, "the last iterations have the final mask"
    z.masked_fill_(pruned, 0.0)
    return pruned, dampening


def _pull(
    z: torch.Tensor,
    target: torch.Tensor,
    keep: torch.Tensor,
    penalty: torch.Tensor,
    pull: torch.Tensor,
    rho: float,
    before: float,
) -> None:
    """Of some inputs, before the solution is added: Z - a D + a T into `z`, and a diag(rho_j) (D - U - T) into `pull`.

    U is rescaled from rho = `before`. `keep`, 1.0 for what D keeps of Z, is overwritten.
    """
    kept = keep.mul_(z)
    if rho != before:
        z.sub_(kept).mul_(before / rho).add_(kept)
    moved = kept - target
    pull.copy_(kept.sub_(z).add_(moved).mul_(penalty * (rho * _RELAXATION)))
    z.sub_(moved, alpha=_RELAXATION)


def _thresholds(
    z: torch.Tensor, scale: torch.Tensor, rows: Sequence[int], patterns: Sequence[Pattern]
) -> torch.Tensor:
    """Of each column [1, sum(rows)], the score that what is kept of its module has to be above; the number is approximate."""
    found = []
    for part, pattern in zip(z.split(list(rows), dim=1), patterns, strict=True):
        inputs, outputs = sampled_places(part.shape[0], part.shape[1], part.device)
        scores = part[inputs, outputs].mul_(scale[inputs, 0]).abs_()
        found.append(z.new_full((1, part.shape[1]), sampled_threshold(scores, pattern.sparsity)))
    return torch.cat(found, dim=1)


def _keep(
    z: torch.Tensor, scale: torch.Tensor, pattern: Pattern, above: torch.Tensor | None
) -> torch.Tensor:
    """1.0 where the pattern keeps some inputs of Z, else 0.0."""
    scores = torch.mul(z, scale).abs_()
    return ranks_in_groups(scores, pattern.m).ge_(pattern.n) if above is None else scores.gt_(above)


def _pruned(
    z: torch.Tensor, scale: torch.Tensor, rows: Sequence[int], patterns: Sequence[Pattern]
) -> torch.Tensor:
    """The exact mask, bool, of what the patterns prune."""
    found = torch.empty_like(z, dtype=torch.bool)
    if patterns[0].is_structured:
        for here in linalg.parts(z, patterns[0].m):
            scores = torch.mul(z[here], scale[here]).abs_()
            torch.lt(ranks_in_groups(scores, patterns[0].m), patterns[0].n, out=found[here])
        return found
    columns = (x.split(list(rows), dim=1) for x in (z, found))
    for part, pruned, pattern in zip(*columns, patterns, strict=True):
        pruned.copy_(lowest(torch.mul(part, scale).abs_(), int(part.numel() * pattern.sparsity)))
    return found


def _stages(iterations: int) -> list[tuple[float, int]]:
    """The values of rho, each with its number of iterations; these sum to `iterations` and those that settle."""
    count = -(-iterations // _STAGE)
    first, last = _RHO
    sizes = [iterations // count + (i < iterations % count) for i in range(count)]
    sizes[-1] += SETTLING
    return [
        (first * (last / first) ** (i / max(count - 1, 1)), size) for i, size in enumerate(sizes)
    ]


def multiply_adds(inputs: int, rows: int, iterations: int) -> tuple[float, float]:
    """Of `prune` for d inputs and r rows of all modules: in factors and inverses (float32), and in products with them."""
    each = [
        _of_stage(inputs, rows, n, inverse=_forms_inverse(inputs, rows, n))
        for _, n in _stages(iterations)
    ]
    return sum(matrix for matrix, _ in each), sum(products for _, products in each)


def _of_stage(d: int, r: int, n: int, *, inverse: bool) -> tuple[float, float]:
    """The same of n iterations; with a factor, its corners of b inputs are multiplied twice."""
    b = min(platform.BLOCK, d)
    return (d**3 / 2, n * d**2 * r) if inverse else (d**3 / 6, n * (d**2 + d * b) * r)


def _forms_inverse(inputs: int, rows: int, repeats: int) -> bool:
    """Whether the inverse takes fewer multiply-adds than the factor, for so many iterations."""
    with_inverse, with_factor = (
        sum(_of_stage(inputs, rows, repeats, inverse=each)) for each in (True, False)
    )
    return with_inverse < with_factor


def _shifted(hessian: torch.Tensor, dampening: Dampening, rho: float) -> torch.Tensor:
    """H + dampening + rho diag, a new tensor."""
    matrix = hessian.clone()
    matrix.diagonal().add_(dampening.added).add_(dampening.diagonal, alpha=rho)
    return matrix


def _is_spoilt(lower: torch.Tensor, dampening: Dampening, rho: float) -> bool:
    """Whether rounding has taken a pivot of a factor below half of rho diag: exactly, all are at least rho diag."""
    return bool((lower.diagonal().square() < dampening.diagonal * (rho / 2)).any())


def _solver(
    hessian: torch.Tensor,
    dampening: Dampening,
    rho: float,
    repeats: int,
    columns: int,
    *,
    bf16: bool,
) -> AddSolution | None:
    """A function of x and y that adds (H + dampening + rho diag)^-1 y to x, and may overwrite y.

    None when that matrix is not positive definite. With `bf16` y is bfloat16.
    """
    inverts = _forms_inverse(len(hessian), columns, repeats)
    shifted = functools.partial(_shifted, hessian, dampening, rho)
    found = linalg.inverse_(shifted()) if inverts else linalg.cholesky_(shifted(), bf16=bf16)
    if bf16 and not inverts and (found is None or _is_spoilt(found, dampening, rho)):
        found = None  # before the next is made
        found = linalg.cholesky_(shifted())
    if found is None:
        return None
    found = found if inverts else platform.invert_corners_(found)
    ready = linalg.rounded_to_bf16_(found) if bf16 else found
    if not inverts:
        return lambda x, y: x.add_(platform.solve_with_corners_(y, ready))
    if not bf16:
        return lambda x, y: x.addmm_(ready, y)

    def add_product(x: torch.Tensor, y: torch.Tensor) -> None:
        for some in linalg.row_blocks(x):
            x[some].add_(ready[some] @ y)

    return add_product
