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

Three things reduce the cost.
*No eigendecomposition.* The paper diagonalises H once, to be free to change rho. That takes about 10 d^3 operations, half of
them bound by memory (on one core 131 ms for d = 768, where a Cholesky factor takes 6 ms and the inverse 13 ms more). With
few stages one factor per stage is cheaper: d^3 / 3 operations, or d^3 with the explicit inverse, whose product is faster
than two triangular solves. The inverse is formed unless d is more than four times the rows.
*bfloat16 products* with the inverse, on devices with units for them (linalg.py). Scaled as above, H + diag(rho_j) has no
eigenvalue below rho, so rounding changes little (0.1 % of the summed error on the reasoner's layers). Factors, inverses and
states are float32.
*Approximate thresholds.* Within the iterations an unstructured threshold comes from a sample; the last one is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rac_modifier.pruning import linalg
from rac_modifier.pruning.linalg import Dampening
from rac_modifier.pruning.topk import lowest, ranks_in_groups, sampled_threshold
from rac_modifier.settings.pattern import Pattern

# rho of the first and of the last stage, relative to the diagonal of H, and a of the equations. On the reasoner's layers at 50,
# 60, 80 % and 2:4, with 16 iterations, other pairs between 0.1 and 0.7 change the sum of the errors by -1 to +5 %; one fixed rho
# costs 24-41 % (with 12). Stages of 8 and of 4 iterations differ by 1 % (2 % at 2:4), and each stage costs one factor.
_RHO = (0.2, 0.5)
_RELAXATION = 1.5
_STAGE = 8  # iterations at one rho
_INVERSE_UP_TO = 4  # times the rows; with products in bfloat16 there is always an inverse

AddSolution = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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
    Memory beside the arguments: d^2 (a matrix, then its factor and its inverse in the same place, also in bfloat16), and 6
    buffers like `weight`.

    Returns:
        The mask of what was pruned, bool [d, sum(rows)], and the dampening that the factorisation needed.

    Raises:
        RacError: naming `label`, when H is not positive definite even with the largest dampening.
    """
    schedule = _stages(iterations)
    first, columns = schedule[0][0], weight.shape[1]
    add_solution, dampening = linalg.raise_until_it_works(
        lambda dampening: _solver(hessian, dampening, first, columns), hessian, dampening, label
    )
    penalty = dampening.diagonal.unsqueeze(1)
    scale = penalty.sqrt()

    target = weight.clone()
    z, kept = weight, torch.empty_like(weight)  # Z and D of the equations
    keep = torch.empty_like(weight)
    torch.mul(z, _keep(z, scale, rows, patterns, keep), out=kept)
    before = first
    for rho, repeats in schedule:
        if rho != before:
            z.sub_(kept).mul_(before / rho).add_(kept)
            del add_solution  # frees its matrix before the next is made
            add_solution = _later_solver(hessian, dampening, rho, columns)
            before = rho
        for _ in range(repeats):
            pull = torch.mul(kept, 2, out=keep).sub_(z).sub_(target).mul_(penalty).mul_(rho * _RELAXATION)
            z.sub_(kept, alpha=_RELAXATION).add_(target, alpha=_RELAXATION)
            add_solution(z, pull)
            torch.mul(z, _keep(z, scale, rows, patterns, keep), out=kept)
    scores = torch.mul(z, scale, out=keep).abs_()
    if patterns[0].is_structured:
        pruned = ranks_in_groups(scores, patterns[0].m) < patterns[0].n
    else:
        parts = zip(scores.split(list(rows), dim=1), patterns, strict=True)
        pruned = torch.cat([lowest(part, int(part.numel() * pattern.sparsity)) for part, pattern in parts], dim=1)
    weight.masked_fill_(pruned, 0.0)
    return pruned, dampening


def _stages(iterations: int) -> list[tuple[float, int]]:
    """The values of rho, each with its number of iterations; these sum to `iterations`."""
    count = -(-iterations // _STAGE)
    first, last = _RHO
    sizes = [iterations // count + (i < iterations % count) for i in range(count)]
    return [(first * (last / first) ** (i / max(count - 1, 1)), size) for i, size in enumerate(sizes)]


def _solver(hessian: torch.Tensor, dampening: Dampening, rho: float, columns: int) -> AddSolution | None:
    """A function of x and y that adds (H + dampening + rho diag)^-1 y to x; None when that matrix is not positive definite."""
    matrix = hessian.clone()
    matrix.diagonal().add_(dampening.added).add_(dampening.diagonal, alpha=rho)
    bf16 = linalg.bf16_is_fast(hessian.device)
    if not bf16 and hessian.shape[0] > _INVERSE_UP_TO * columns:
        factor = linalg.cholesky_(matrix)
        return None if factor is None else lambda x, y: x.add_(linalg.cholesky_solve(y, factor))
    inverse = linalg.inverse_(matrix)
    del matrix
    if inverse is None:
        return None
    inverse = linalg.rounded_to_bf16_(inverse) if bf16 else inverse
    return lambda x, y: linalg.bf16_addmm(x, inverse, y, bf16=bf16)


def _later_solver(hessian: torch.Tensor, dampening: Dampening, rho: float, columns: int) -> AddSolution:
    solver = _solver(hessian, dampening, rho, columns)
    assert solver is not None, "a positive definite matrix stays so when its diagonal grows"
    return solver


def _keep(
    z: torch.Tensor, scale: torch.Tensor, rows: Sequence[int], patterns: Sequence[Pattern], scores: torch.Tensor
) -> torch.Tensor:
    """1.0 where the pattern keeps z, else 0.0; the unstructured number is approximate. Overwrites the buffer `scores`."""
    torch.mul(z, scale, out=scores).abs_()
    if patterns[0].is_structured:
        return ranks_in_groups(scores, patterns[0].m).ge_(patterns[0].n)
    for part, pattern in zip(scores.split(list(rows), dim=1), patterns, strict=True):
        part.gt_(sampled_threshold(part, pattern.sparsity))
    return scores
