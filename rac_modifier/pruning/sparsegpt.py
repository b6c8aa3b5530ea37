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
- *Small problems are solved at once*: each input takes a few operations on a row of weights, which for small rows take as long as
  their calls do. `weight` and `lower` may have a leading dimension: problems of one shape with an H each (routed experts).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rac_modifier.pruning.linalg import Factor, diagonal_blocks
from rac_modifier.pruning.topk import lowest, lowest_along
from rac_modifier.settings.pattern import Pattern

_SUB_BLOCK = 32
# Most weights of the problems that are solved at once: on a CPU as many as stay in its caches, on a GPU, where calls take longer,
# 256 MB per buffer (results/log.md).
_AT_ONCE_ON_CPU, _AT_ONCE_ON_GPU = 1 << 21, 1 << 26


def at_once(columns: int, rows: int, device: torch.device) -> int:
    """How many problems of this shape should be solved at once: several if they are small, else one."""
    most = _AT_ONCE_ON_CPU if device.type == "cpu" else _AT_ONCE_ON_GPU
    return max(most // (columns * rows), 1)


def prune_alike(
    weights: Sequence[torch.Tensor],
    factors: Sequence[Factor],
    rows: Sequence[int],
    patterns: Sequence[Pattern],
    block_size: int,
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`prune` of problems of one shape with the same patterns: of each the weights, the mask of what was pruned, the errors."""
    lower, uniform = [f.reversed_lower for f in factors], [f.dampening.uniform for f in factors]
    if len(weights) == 1:
        return [(weights[0], *prune(weights[0], lower[0], uniform[0], rows, patterns, block_size))]
    together = torch.stack(list(weights))
    found = prune(together, torch.stack(lower), torch.stack(uniform), rows, patterns, block_size)
    return list(zip(together, *found, strict=True))


def prune(
    weight: torch.Tensor,
    lower: torch.Tensor,
    uniform: torch.Tensor,
    rows: Sequence[int],
    patterns: Sequence[Pattern],
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune `weight` [..., d, sum(rows)] (transposed) in place, modules of `rows` rows each side by side.

    `lower` [..., d, d] is the `reversed_lower` of each problem's factor (linalg.py), and `uniform` [...] the dampening in it.

    Unstructured: in each block of inputs, exactly floor(block numel * sparsity) weights of a module are pruned, those
    with the lowest scores (llm-compressor's `score <= threshold` prunes one more, which can change the rest of a row). N:M: the
    N lowest of each group, scored when the inputs before it are done; the block size is rounded down to a multiple of M.

    Returns:
        The mask of what was pruned, [..., d, sum(rows)], and the error d H d^T of each row, float64 [..., sum(rows)]. It is
        computed as a difference from the dampened error, and is accurate to about 1e-5 of that.
    """
    d, pattern = weight.shape[-2], patterns[0]
    step = (
        max(block_size - block_size % pattern.m, pattern.m) if pattern.is_structured else block_size
    )
    change = torch.empty_like(
        weight
    )  # D = W - W' of the inputs that are done, in reversed order like the factor
    pruned = torch.empty_like(weight, dtype=torch.bool)
    uniform = uniform[..., None, None]
    error = torch.zeros_like(weight[..., 0, :], dtype=torch.float64)
    for start in range(0, d, step):
        stop = min(start + step, d)
        here, before = slice(d - stop, d - start), slice(d - start, d)
        u, r = diagonal_blocks(lower, start, stop)
        passed_on = (lower[..., before, here].mT @ change[..., before, :]).flip(-2)
        block = weight[..., start:stop, :].clone()
        _add_product(block, r.mT, passed_on)
        choose = _settle_groups if pattern.is_structured else _settle_lowest
        mask = choose(block, r, rows, patterns)
        block.masked_fill_(mask, 0.0)
        moved = weight[..., start:stop, :] - block
        _add_product(passed_on, u.mT, moved)
        error += passed_on.square_().addcmul_(moved, moved * uniform, value=-1).sum(-2)
        change[..., here, :] = moved.flip(-2)
        weight[..., start:stop, :] = block
        pruned[..., start:stop, :] = mask
    return pruned, error.clamp_(min=0.0)


def _settle_groups(
    block: torch.Tensor, r: torch.Tensor, rows: Sequence[int], patterns: Sequence[Pattern]
) -> torch.Tensor:
    """Choose and prune groups of M inputs, from the first to the last; returns the mask of what is pruned."""
    mask, pattern = torch.empty_like(block, dtype=torch.bool), patterns[0]
    for start in range(0, block.shape[-2], pattern.m):
        group = slice(start, start + pattern.m)
        scores = _scores(block[..., group, :], r[..., group, group])
        mask[..., group, :] = lowest_along(scores, pattern.n, dim=-2)
        _settle(block, r, mask, group.start, group.stop)
    return mask


def _settle_lowest(
    block: torch.Tensor, r: torch.Tensor, rows: Sequence[int], patterns: Sequence[Pattern]
) -> torch.Tensor:
    """Choose the mask of the whole block, each module with its own threshold, and prune it; returns the mask."""
    mask = torch.empty_like(block, dtype=torch.bool)
    modules = zip(
        _scores(block, r).split(list(rows), dim=-1),
        mask.split(list(rows), dim=-1),
        patterns,
        strict=True,
    )
    for scores, chosen, pattern in modules:
        count = int(scores.shape[-2:].numel() * pattern.sparsity)
        for one, of_one in zip(
            scores.reshape(-1, *scores.shape[-2:]), chosen.view(-1, *scores.shape[-2:]), strict=True
        ):
            of_one.copy_(lowest(one, count))
    for start in range(0, block.shape[-2], _SUB_BLOCK):
        _settle(block, r, mask, start, min(start + _SUB_BLOCK, block.shape[-2]))
    return mask


def _scores(block: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return (block / _diagonal(r).unsqueeze(-1)).square_()


def _settle(
    block: torch.Tensor, r: torch.Tensor, mask: torch.Tensor, start: int, stop: int
) -> None:
    """Add the errors of the pruned weights of inputs [start, stop) to the inputs after each, in place.

    A pruned weight keeps the value that it had when it was pruned; the caller sets it to zero.
    """
    chosen = (
        mask[..., start:stop, :] / _diagonal(r)[..., start:stop, None]
    )  # 1 / R_jj where pruned, else 0
    errors = torch.empty_like(chosen)
    for j in range(start, stop):
        error = torch.mul(
            block[..., j, :], chosen[..., j - start, :], out=errors[..., j - start, :]
        )
        if j + 1 < stop:
            _subtract_outer(block[..., j + 1 : stop, :], r[..., j, j + 1 : stop], error)
    if stop < block.shape[-2]:
        _add_product(block[..., stop:, :], r[..., start:stop, stop:].mT, errors, alpha=-1)


def _diagonal(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float = 1) -> None:
    """`out` += alpha `a` @ `b`, of one problem or of several."""
    (out.addmm_ if out.ndim == 2 else out.baddbmm_)(a, b, alpha=alpha)


def _subtract_outer(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """`out` [..., n, rows] -= `a` [..., n] times `b` [..., rows]."""
    if out.ndim == 2:
        out.addr_(a, b, alpha=-1)
    else:  # as one rank-1 product per problem it would be slower
        out.addcmul_(a.unsqueeze(-1), b.unsqueeze(-2), value=-1)
