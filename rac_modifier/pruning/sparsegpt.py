"""SparseGPT (arXiv 2301.00774): prune column by column, moving what is lost onto the columns still to come.

The algorithm, with R upper triangular and H^-1 = R^T R: from left to right, a pruned weight of column j leaves the
error e_j = w_j / R_jj, and every later column k becomes w_k - e_j R_jk. Scores are (w_j / R_jj)^2.

Three things make it cheap here, and none changes the result beyond rounding:

- *One Cholesky, no inverse.* U = R^-1 is the upper factor of H = U U^T, that is the Cholesky factor of H read from the
  last column to the first. The errors of all rows are E = D U, where D = W - W' is the change made, so when a block B
  is reached the columns before it have turned its weights into W_B + (D_before U_before,B) R_BB, and R_BB is the
  inverse of the small U_BB. d^3 / 3 operations, where forming H^-1 and factoring it takes 4 d^3 / 3, and better
  rounding. What the layer loses comes with it: trace(D H D^T) = ||E||^2, less the dampening's share.
- *Few, long kernels.* Weights are held transposed, [d, rows], so that a column is contiguous; a column costs one
  product and one rank-1 update inside a sub-block, and a sub-block one matrix product. (One batched triangular solve a
  sub-block, a system for each row's pruned columns, was slower on a CPU from 768 rows up, and 30 times at 8,960.)
- *Modules that share H are solved stacked*; only the unstructured threshold is each module's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rac_modifier.pruning.linalg import raise_until_it_works
from rac_modifier.pruning.topk import lowest, lowest_along
from rac_modifier.settings.pattern import Pattern

_SUB_BLOCK = 32


@dataclass(frozen=True)
class Factor:
    """H + dampening * I = U U^T, as `reversed_lower` [d, d]: U[i, j] = reversed_lower[d-1-i, d-1-j], lower triangular.

    `dampening` is `dampening_frac` of the mean diagonal, which took `retries` raises to reach.
    """

    reversed_lower: torch.Tensor
    dampening: torch.Tensor
    dampening_frac: float
    retries: int


def factorise(hessian: torch.Tensor, dampening_frac: float, label: str) -> Factor:
    """Factor H + dampening_frac * mean(diag H) * I; inputs that never fired get a diagonal that leaves the rest alone.

    The mean is over the Hessian as it is, so scaling H changes nothing (llm-compressor sets dead diagonals to 1 first).

    Raises:
        RacError: naming `label`, when it is not positive definite even with the largest dampening.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    filled = torch.where(diagonal == 0, mean, diagonal)
    damped = hessian.flip(0, 1)

    def attempt(frac: float) -> torch.Tensor | None:
        damped.diagonal().copy_((filled + frac * mean).flip(0))
        lower, info = torch.linalg.cholesky_ex(damped)
        return lower if int(info) == 0 else None

    lower, frac, retries = raise_until_it_works(attempt, dampening_frac, label)
    return Factor(lower, frac * mean, frac, retries)


def prune(
    weight: torch.Tensor, factor: Factor, rows: Sequence[int], patterns: Sequence[Pattern], block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune `weight` [d, sum(rows)] (transposed) in place, modules of `rows` rows each side by side.

    Unstructured: in each block of columns a module loses exactly its floor(block numel * sparsity) lowest scores
    (llm-compressor's `score <= threshold` takes one more, after which a row may go another way). N:M: the N lowest of
    each group, scored when the columns before it are settled; blocks are cut to a multiple of M.

    Returns:
        The mask of what was pruned, [d, sum(rows)], and each row's error d H d^T, float64 [sum(rows)]. The error is a
        difference from the dampened one, and resolved to about 1e-5 of that.
    """
    d, pattern = weight.shape[0], patterns[0]
    step = max(block_size - block_size % pattern.m, pattern.m) if pattern.is_structured else block_size
    change = torch.empty_like(weight)  # D = W - W' of the settled columns, in reversed order like the factor
    pruned = torch.empty_like(weight, dtype=torch.bool)
    dampening = float(factor.dampening)
    error = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, d, step):
        stop = min(start + step, d)
        here, before = slice(d - stop, d - start), slice(d - start, d)
        u = factor.reversed_lower[here, here].flip(0, 1)
        r = torch.linalg.solve_triangular(u, torch.eye(stop - start).to(u), upper=True)
        passed_on = (factor.reversed_lower[before, here].T @ change[before]).flip(0)
        block = torch.addmm(weight[start:stop], r.T, passed_on)
        choose = _settle_groups if pattern.is_structured else _settle_lowest
        mask = choose(block, r, rows, patterns)
        block.masked_fill_(mask, 0.0)
        moved = weight[start:stop] - block
        error += passed_on.addmm_(u.T, moved).square_().sub_(moved.square(), alpha=dampening).sum(0)
        change[here] = moved.flip(0)
        weight[start:stop] = block
        pruned[start:stop] = mask
    return pruned, error.clamp_(min=0.0)


def _settle_groups(
    block: torch.Tensor, r: torch.Tensor, rows: Sequence[int], patterns: Sequence[Pattern]
) -> torch.Tensor:
    """Choose and settle groups of M columns from left to right; returns the mask of what is pruned."""
    mask, pattern = torch.empty_like(block, dtype=torch.bool), patterns[0]
    for start in range(0, block.shape[0], pattern.m):
        group = slice(start, start + pattern.m)
        mask[group] = lowest_along(_scores(block[group], r[group, group]), pattern.n, dim=0)
        _settle(block, r, mask, group.start, group.stop)
    return mask


def _settle_lowest(
    block: torch.Tensor, r: torch.Tensor, rows: Sequence[int], patterns: Sequence[Pattern]
) -> torch.Tensor:
    """Choose the whole block's mask, each module with its own threshold, and settle it; returns the mask."""
    modules = zip(_scores(block, r).split(list(rows), dim=1), patterns, strict=True)
    mask = torch.cat([lowest(scores, int(scores.numel() * pattern.sparsity)) for scores, pattern in modules], dim=1)
    for start in range(0, block.shape[0], _SUB_BLOCK):
        _settle(block, r, mask, start, min(start + _SUB_BLOCK, block.shape[0]))
    return mask


def _scores(block: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return (block / r.diagonal().unsqueeze(1)).square_()


def _settle(block: torch.Tensor, r: torch.Tensor, mask: torch.Tensor, start: int, stop: int) -> None:
    """Push the errors of pruned columns [start, stop) onto the columns right of each, in place.

    A pruned column keeps the value that it had when its turn came; the caller zeroes it.
    """
    chosen = mask[start:stop] / r.diagonal()[start:stop].unsqueeze(1)  # 1 / R_jj where pruned, else 0
    errors = torch.empty_like(chosen)
    for j in range(start, stop):
        error = torch.mul(block[j], chosen[j - start], out=errors[j - start])
        if j + 1 < stop:
            block[j + 1 : stop].addr_(r[j, j + 1 : stop], error, alpha=-1)
    if stop < block.shape[0]:
        block[stop:].addmm_(r[start:stop, stop:].T, errors, alpha=-1)
