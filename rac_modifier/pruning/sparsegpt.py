"""SparseGPT (arXiv 2301.00774): prune input by input, and correct each error with the inputs that come after it.

The algorithm, with R upper triangular and H^-1 = R^T R: from the first input to the last, pruning the weight of input j
causes the error e_j = w_j / R_jj, and the weight of every later input k becomes w_k - e_j R_jk. Scores are (w_j / R_jj)^2.

Three things reduce its cost here. None changes the result beyond rounding:

- *One Cholesky, no inverse.* U = R^-1 is the upper factor of H = U U^T, which is the Cholesky factor of H read from the
  last input to the first. The errors of all rows are E = D U, where D = W - W' is the change made. So when block B is
  reached, the inputs before it have turned its weights into W_B + (D_before U_before,B) R_BB, and R_BB is the
  inverse of the small U_BB. This takes d^3 / 3 operations, where forming H^-1 and factoring it takes 4 d^3 / 3, and it rounds
  better. It also gives the error of the layer: trace(D H D^T) = ||E||^2, less the share of the dampening.
- *Few, long operations.* Weights are transposed, [d, rows], so that one input is contiguous. An input costs one
  product and one rank-1 update inside a sub-block, and a sub-block costs one matrix product. (One batched triangular solve per
  sub-block, with one system per row, was slower on a CPU from 768 rows up, and 30 times slower at 8,960.)
- *Modules that share H are solved side by side*; only the unstructured threshold is per module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rac_modifier.pruning.linalg import Factor
from rac_modifier.pruning.topk import lowest, lowest_along
from rac_modifier.settings.pattern import Pattern

_SUB_BLOCK = 32


def prune(
    weight: torch.Tensor, factor: Factor, rows: Sequence[int], patterns: Sequence[Pattern], block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune `weight` [d, sum(rows)] (transposed) in place, modules of `rows` rows each side by side.

    Unstructured: in each block of inputs, exactly floor(block numel * sparsity) weights of a module are pruned, those
    with the lowest scores (llm-compressor's `score <= threshold` prunes one more, which can change the rest of a row). N:M: the
    N lowest of each group, scored when the inputs before it are done; the block size is rounded down to a multiple of M.

    Returns:
        The mask of what was pruned, [d, sum(rows)], and the error d H d^T of each row, float64 [sum(rows)]. It is computed
        as a difference from the dampened error, and is accurate to about 1e-5 of that.
    """
    d, pattern = weight.shape[0], patterns[0]
    step = max(block_size - block_size % pattern.m, pattern.m) if pattern.is_structured else block_size
    change = torch.empty_like(weight)  # D = W - W' of the inputs that are done, in reversed order like the factor
    pruned = torch.empty_like(weight, dtype=torch.bool)
    uniform = float(factor.dampening.uniform)
    error = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, d, step):
        stop = min(start + step, d)
        here, before = slice(d - stop, d - start), slice(d - start, d)
        u, r = factor.block(start, stop)
        passed_on = (factor.reversed_lower[before, here].T @ change[before]).flip(0)
        block = torch.addmm(weight[start:stop], r.T, passed_on)
        choose = _settle_groups if pattern.is_structured else _settle_lowest
        mask = choose(block, r, rows, patterns)
        block.masked_fill_(mask, 0.0)
        moved = weight[start:stop] - block
        error += passed_on.addmm_(u.T, moved).square_().sub_(moved.square(), alpha=uniform).sum(0)
        change[here] = moved.flip(0)
        weight[start:stop] = block
        pruned[start:stop] = mask
    return pruned, error.clamp_(min=0.0)


def _settle_groups(
    block: torch.Tensor, r: torch.Tensor, rows: Sequence[int], patterns: Sequence[Pattern]
) -> torch.Tensor:
    """Choose and prune groups of M inputs, from the first to the last; returns the mask of what is pruned."""
    mask, pattern = torch.empty_like(block, dtype=torch.bool), patterns[0]
    for start in range(0, block.shape[0], pattern.m):
        group = slice(start, start + pattern.m)
        mask[group] = lowest_along(_scores(block[group], r[group, group]), pattern.n, dim=0)
        _settle(block, r, mask, group.start, group.stop)
    return mask


def _settle_lowest(
    block: torch.Tensor, r: torch.Tensor, rows: Sequence[int], patterns: Sequence[Pattern]
) -> torch.Tensor:
    """Choose the mask of the whole block, each module with its own threshold, and prune it; returns the mask."""
    modules = zip(_scores(block, r).split(list(rows), dim=1), patterns, strict=True)
    mask = torch.cat([lowest(scores, int(scores.numel() * pattern.sparsity)) for scores, pattern in modules], dim=1)
    for start in range(0, block.shape[0], _SUB_BLOCK):
        _settle(block, r, mask, start, min(start + _SUB_BLOCK, block.shape[0]))
    return mask


def _scores(block: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return (block / r.diagonal().unsqueeze(1)).square_()


def _settle(block: torch.Tensor, r: torch.Tensor, mask: torch.Tensor, start: int, stop: int) -> None:
    """Add the errors of the pruned weights of inputs [start, stop) to the inputs after each, in place.

    A pruned weight keeps the value that it had when it was pruned; the caller sets it to zero.
    """
    chosen = mask[start:stop] / r.diagonal()[start:stop].unsqueeze(1)  # 1 / R_jj where pruned, else 0
    errors = torch.empty_like(chosen)
    for j in range(start, stop):
        error = torch.mul(block[j], chosen[j - start], out=errors[j - start])
        if j + 1 < stop:
            block[j + 1 : stop].addr_(r[j, j + 1 : stop], error, alpha=-1)
    if stop < block.shape[0]:
        block[stop:].addmm_(r[start:stop, stop:].T, errors, alpha=-1)
