"""ALPS (arXiv 2406.07831): ADMM chooses the kept weights together with their values.

The layer problem min trace((W - T) H (W - T)^T) with W in the pattern is split into W = D with D in
the pattern. The paper scales the columns of W by s_j = sqrt(H_jj). Here the penalty has that scale,
rho_j = rho * H_jj, and no copy is needed. With the scaled dual U, an iteration is

    W <- T + (H + diag(rho_j))^-1 diag(rho_j) (D - U - T)
    Z <- a W + (1 - a) D + U
    D <- Z without the lowest |Z_ij| s_j that the pattern prunes
    U <- Z - D

U is what Z has beyond D, so Z alone holds the state: D - U = 2 D - Z. Over-relaxation, a > 1 (Boyd
et al., 2011, section 3.4.3), lowers the error by 2 %. A small rho follows the data, a large one
makes W and D agree: rho rises in fixed stages, and U is rescaled with it. The last iterations keep
the final mask, so they are ADMM for the values alone.

What limits the cost:
- A factor per stage, or the inverse where it takes fewer multiply-adds; the paper's
  eigendecomposition of H takes 10 d^3.
- bfloat16 matmuls with the inverse or factor where these are fast (linalg.py). Scaled as above,
  H + diag(rho_j) has no eigenvalue below rho, so rounding changes the summed error by 0.1 %.
- Thresholds of unstructured patterns come from a sample, but for the final mask.
- D is computed from Z for a few inputs at a time, which stay in the caches.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rac_modifier.pruning import cholesky, linalg
from rac_modifier.pruning.linalg import Dampening
from rac_modifier.pruning.masks import lowest, ranks_in_groups, sampled_threshold
from rac_modifier.pruning.problem import Masked, Problem, SolverOptions, Target
from rac_modifier.settings.pattern import Pattern

# rho of the first and of the last stage, relative to the diagonal of H, and a of the equations.
# Other pairs between 0.1 and 0.7 change the summed error by -1 to +5 %, a fixed rho by 24 to 41 %.
_RHO = (0.2, 0.5)
_RELAXATION = 1.5
_STAGE = 4  # iterations at one rho
_SETTLING = 2  # iterations with the final mask; they gain more than as many steps of the refit

AddSolution = Callable[[Tensor, Tensor], object]


def prune(targets: Sequence[Target], options: SolverOptions) -> list[Masked]:
    """Prune each problem: unstructured exactly floor(numel * sparsity) weights of each module.

    N:M, the same for all modules of a problem: the N lowest of each group. RacError where H is not
    positive definite even with the largest dampening.
    """
    return [_prune(target, options.iterations) for target in targets]


def _prune(target: Target, iterations: int) -> Masked:
    problem, hessian = target.problem, target.problem.hessian
    z = target.start()  # D = T, U = 0
    goal, columns, stages = z.clone(), z.shape[1], _stages(iterations)
    bf16 = linalg.bf16_is_fast(hessian.device)
    add_solution, dampening = target.dampening.raise_until(
        lambda dampening: _solver(hessian, dampening, *stages[0], columns, bf16=bf16),
        hessian,
        problem.label,
    )
    penalty = dampening.diagonal.unsqueeze(1)  # rho_j / rho, H_jj
    scale = penalty.sqrt()  # s_j
    pruned, iteration, before = None, 0, stages[0][0]
    for rho, repeats in stages:
        if rho != before:
            del add_solution  # frees its matrix before the next is computed
            solver = _solver(hessian, dampening, rho, repeats, columns, bf16=bf16)
            assert solver is not None, "a positive definite matrix stays so when its diagonal grows"
            add_solution = solver
            del solver
        for _ in range(repeats):
            if iteration == iterations:
                pruned = _final_mask(z, scale, problem)
            above = None
            if pruned is None and not problem.patterns[0].is_structured:
                above = _thresholds(z, scale, problem)
            pull = torch.empty_like(z, dtype=torch.bfloat16 if bf16 else z.dtype)
            for part in linalg.cached_slices(z, max(problem.patterns[0].m, 1)):
                if pruned is None:
                    keep = _keep(z[part], scale[part], problem.patterns[0], above)
                else:
                    keep = (~pruned[part]).to(z)
                kept = keep.mul_(z[part])  # D
                if rho != before:  # U <- U before / rho: Z = D + (Z - D) before / rho
                    z[part].sub_(kept).mul_(before / rho).add_(kept)
                moved = kept - goal[part]  # D - T
                kept.sub_(z[part]).add_(moved)  # D - U - T, since D - U = 2 D - Z
                # a diag(rho_j) (D - U - T)
                pull[part].copy_(kept.mul_(penalty[part] * (rho * _RELAXATION)))
                z[part].sub_(moved, alpha=_RELAXATION)  # Z - a D + a T = (1 - a) D + U + a T
            before, iteration = rho, iteration + 1
            # Z <- a W + (1 - a) D + U, with W = T + (H + diag(rho_j))^-1 diag(rho_j) (D - U - T)
            add_solution(z, pull)
            del pull  # while there are scores
    assert pruned is not None, "the last iterations have the final mask"
    return Masked(target, z.masked_fill_(pruned, 0.0), pruned, dampening)


def _thresholds(z: Tensor, scale: Tensor, problem: Problem) -> Tensor:
    """Return the score that a kept weight exceeds, [1, sum(rows)]; its count is approximate."""
    thresholds = []
    for module, pattern in zip(z.split(problem.rows, dim=1), problem.patterns, strict=True):
        threshold = sampled_threshold(module, scale, pattern.sparsity)
        thresholds.append(z.new_full((1, module.shape[1]), threshold))
    return torch.cat(thresholds, dim=1)


def _keep(z: Tensor, scale: Tensor, pattern: Pattern, above: Tensor | None) -> Tensor:
    """Return 1.0 where the pattern keeps a few inputs of Z, else 0.0."""
    scores = torch.mul(z, scale).abs_()  # |Z_ij| s_j
    return ranks_in_groups(scores, pattern.m).ge_(pattern.n) if above is None else scores.gt_(above)


def _final_mask(z: Tensor, scale: Tensor, problem: Problem) -> Tensor:
    """Return the exact mask, bool, of what the patterns prune."""
    mask, pattern = torch.empty_like(z, dtype=torch.bool), problem.patterns[0]
    if pattern.is_structured:
        for part in linalg.cached_slices(z, pattern.m):
            torch.eq(_keep(z[part], scale[part], pattern, None), 0.0, out=mask[part])
        return mask
    columns = (x.split(problem.rows, dim=1) for x in (z, mask))
    for module, pruned, pattern in zip(*columns, problem.patterns, strict=True):
        scores = torch.mul(module, scale).abs_()
        pruned.copy_(lowest(scores, int(module.numel() * pattern.sparsity)))
    return mask


def _stages(iterations: int) -> list[tuple[float, int]]:
    """Return each rho with its iterations, `iterations` + _SETTLING in all."""
    # rho_i = first (last / first)^(i / (count - 1)): a geometric series
    count = -(-iterations // _STAGE)
    first, last = _RHO
    sizes = [iterations // count + (i < iterations % count) for i in range(count)]
    sizes[-1] += _SETTLING
    return [
        (first * (last / first) ** (i / max(count - 1, 1)), size) for i, size in enumerate(sizes)
    ]


def _forms_inverse(d: int, rows: int, repeats: int) -> bool:
    """Return whether the inverse takes fewer multiply-adds than a factor for `repeats` matmuls."""
    b = min(cholesky.BLOCK, d)  # corners of a factor are multiplied twice
    # L takes d^3 / 6 and two triangles per matmul; the inverse d^3 / 6 + d^3 / 3 and one square
    by_factor = d**3 / 6 + repeats * (d**2 + d * b) * rows
    return d**3 / 2 + repeats * d**2 * rows < by_factor


def _solver(
    hessian: Tensor, dampening: Dampening, rho: float, repeats: int, columns: int, *, bf16: bool
) -> AddSolution | None:
    """Return what adds (H + dampening + rho diag)^-1 y to x; None: not positive definite."""

    def shifted() -> Tensor:
        matrix = hessian.clone()  # H' + rho diag(H')
        matrix.diagonal().add_(dampening.added).add_(dampening.diagonal, alpha=rho)
        return matrix

    if _forms_inverse(len(hessian), columns, repeats):
        inverse = cholesky.inverse_(shifted())
        if inverse is None:
            return None
        if not bf16:
            return lambda x, y: x.addmm_(inverse, y)
        rounded = inverse.bfloat16()
        del inverse
        return lambda x, y: [x[r].add_(rounded[r] @ y) for r in linalg.row_blocks(x)]
    lower = cholesky.cholesky_(shifted())
    if lower is None:
        return None
    factor = cholesky.invert_corners_(lower)
    factor = factor.bfloat16() if bf16 else factor
    return lambda x, y: x.add_(cholesky.solve_with_corners_(y, factor))
