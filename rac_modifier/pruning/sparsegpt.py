"""SparseGPT (arXiv 2301.00774): prune input by input, and correct each error with later inputs.

With R upper triangular and H^-1 = R^T R: from the first input to the last, pruning the weight of
input j causes the error e_j = w_j / R_jj, and the weight of each later input k becomes
w_k - e_j R_jk. Scores are (w_j / R_jj)^2. What reduces the cost changes nothing but rounding:

- *One Cholesky, no inverse.* U = R^-1 is the upper factor of H = U U^T: the Cholesky factor of H
  read from the last input to the first. The errors of all rows are E = D U, where D = W - W' is the
  change. So when block B is reached, the inputs before it have turned its weights into
  W_B + (D_before U_before,B) R_BB, and R_BB is the inverse of the small U_BB. This takes a quarter
  of the operations of factoring H^-1, and it rounds better. It also gives the error of the layer:
  trace(D H D^T) = ||E||^2, less the share of the dampening.
- *Few, long operations.* Weights are transposed, [d, rows], so that an input is contiguous. An
  input costs a multiplication and a rank-1 update in a sub-block, a sub-block costs one matmul.
- *A batch of small problems*, with an H each (routed experts): for short rows the calls take as
  long as the work. `weight` and `lower` may have a leading dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rac_modifier.pruning.linalg import Factor
from rac_modifier.pruning.masks import lowest, lowest_along
from rac_modifier.pruning.problem import Masked, SolverOptions, Target
from rac_modifier.settings.pattern import Pattern

_BLOCK, _SUB_BLOCK = 128, 32  # inputs
# Most weights of a batch of problems: on a CPU what fits into its caches, on a GPU, where calls
# take longer, 256 MB per buffer (results/log.md).
_BATCH_ON_CPU, _BATCH_ON_GPU = 1 << 21, 1 << 26


def problems_per_batch(columns: int, rows: int, device: torch.device) -> int:
    """Return how many problems of this shape to solve as a batch: several if small, else one."""
    most = _BATCH_ON_CPU if device.type == "cpu" else _BATCH_ON_GPU
    return max(most // (columns * rows), 1)


def prune(targets: Sequence[Target], options: SolverOptions) -> list[Masked]:
    """Prune problems; those of one shape with the same patterns as a batch."""
    problems = [target.problem for target in targets]
    if len({(p.hessian.shape, *p.rows, *p.patterns) for p in problems}) > 1:
        return [masked for target in targets for masked in prune([target], options)]
    factors = [target.factor for target in targets if target.factor is not None]
    lower = [factor.reversed_lower for factor in factors]
    uniform = [factor.dampening.uniform for factor in factors]
    weights = [target.start() for target in targets]
    rows, patterns = problems[0].rows, problems[0].patterns
    if len(targets) == 1:
        pruned, errors = _prune_columns(weights[0], lower[0], uniform[0], rows, patterns)
        return [Masked(targets[0], weights[0], pruned, targets[0].dampening, errors)]
    batch = torch.stack(weights)
    results = _prune_columns(batch, torch.stack(lower), torch.stack(uniform), rows, patterns)
    return [
        Masked(target, weight, pruned, target.dampening, errors)
        for target, weight, pruned, errors in zip(targets, batch, *results, strict=True)
    ]


def _prune_columns(
    weight: Tensor,
    lower: Tensor,
    uniform: Tensor,
    rows: Sequence[int],
    patterns: Sequence[Pattern],
) -> tuple[Tensor, Tensor]:
    """Prune `weight` [..., d, sum(rows)] (transposed) in place, modules side by side.

    Unstructured: in each block of inputs exactly floor(block numel * sparsity) weights of a module
    are pruned, with the lowest scores (llm-compressor's `score <= threshold` prunes one more). N:M:
    the N lowest of each group, scored when the inputs before are done; the block size is rounded
    down to a multiple of M.

    `lower` [..., d, d] are the `reversed_lower` of the factors (linalg.py), `uniform` [...] their
    dampening, `rows` and `patterns` those of the modules.

    Returns:
        The mask of the pruned weights, [..., d, sum(rows)], and the error d H d^T of each row,
        float64 [..., sum(rows)], accurate to about 1e-5 of the dampened error.
    """
    d, pattern, step = weight.shape[-2], patterns[0], _BLOCK
    if pattern.is_structured:
        step = max(step - step % pattern.m, pattern.m)
    change = torch.empty_like(weight)  # D^T of the inputs before, reversed like the factor
    pruned = torch.empty_like(weight, dtype=torch.bool)
    uniform = uniform[..., None, None]
    error = torch.zeros_like(weight[..., 0, :], dtype=torch.float64)
    for start in range(0, d, step):
        stop = min(start + step, d)
        reversed_block, before = slice(d - stop, d - start), slice(d - start, d)
        u, r = Factor.diagonal_blocks(lower, start, stop)  # U_BB, R_BB = U_BB^-1
        # (D_before U_before,B)^T
        passed_on = (lower[..., before, reversed_block].mT @ change[..., before, :]).flip(-2)
        # W_B^T <- W_B^T + R_BB^T (D_before U_before,B)^T: all earlier errors have arrived
        block = weight[..., start:stop, :].clone()
        _add_matmul(block, r.mT, passed_on)
        if pattern.is_structured:
            mask = _settle_groups(block, r, pattern)
        else:
            mask = _settle_lowest(block, r, rows, patterns)
        block.masked_fill_(mask, 0.0)  # the pruned weights of these inputs
        moved = weight[..., start:stop, :] - block  # D_B^T
        # E_B = (D U)_B = D_before U_before,B + D_B U_BB
        _add_matmul(passed_on, u.mT, moved)
        # trace(D H D^T) = ||E||^2 - lambda ||D||^2
        error += passed_on.square_().addcmul_(moved, moved * uniform, value=-1).sum(-2)
        change[..., reversed_block, :] = moved.flip(-2)
        weight[..., start:stop, :] = block
        pruned[..., start:stop, :] = mask
    return pruned, error.clamp_(min=0.0)


def _settle_groups(block: Tensor, r: Tensor, pattern: Pattern) -> Tensor:
    """Choose and prune groups of M inputs, from the first to the last; return the mask."""
    mask = torch.empty_like(block, dtype=torch.bool)
    for start in range(0, block.shape[-2], pattern.m):
        group = slice(start, start + pattern.m)
        scores = _scores(block[..., group, :], r[..., group, group])
        mask[..., group, :] = lowest_along(scores, pattern.n, dim=-2)
        _settle(block, r, mask, group.start, group.stop)
    return mask


def _settle_lowest(
    block: Tensor, r: Tensor, rows: Sequence[int], patterns: Sequence[Pattern]
) -> Tensor:
    """Choose the mask of the block, with a threshold per module, and prune it; return the mask."""
    mask = torch.empty_like(block, dtype=torch.bool)
    columns = (x.split(list(rows), dim=-1) for x in (_scores(block, r), mask))
    for scores, chosen, pattern in zip(*columns, patterns, strict=True):
        shape = scores.shape[-2:]
        count = int(shape.numel() * pattern.sparsity)
        problems = zip(scores.reshape(-1, *shape), chosen.view(-1, *shape), strict=True)
        for of_problem, result in problems:
            result.copy_(lowest(of_problem, count))
    for start in range(0, block.shape[-2], _SUB_BLOCK):
        _settle(block, r, mask, start, min(start + _SUB_BLOCK, block.shape[-2]))
    return mask


def _scores(block: Tensor, r: Tensor) -> Tensor:
    # (w_j / R_jj)^2: what pruning w_j adds to the error while later inputs correct it
    return (block / r.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)).square_()


def _settle(block: Tensor, r: Tensor, mask: Tensor, start: int, stop: int) -> None:
    """Add the errors of the pruned weights of inputs [start, stop), which stay, to later inputs."""
    diagonal = r.diagonal(dim1=-2, dim2=-1)[..., start:stop, None]
    inverse = mask[..., start:stop, :] / diagonal  # 1 / R_jj where pruned, else 0
    errors = torch.empty_like(inverse)
    for j in range(start, stop):
        error = errors[..., j - start, :]
        # e_j = w_j / R_jj; w_k <- w_k - e_j R_jk for the later inputs k of the sub-block
        torch.mul(block[..., j, :], inverse[..., j - start, :], out=error)
        _subtract_outer(block[..., j + 1 : stop, :], r[..., j, j + 1 : stop], error)
    # the same for the inputs after the sub-block, of all its errors at once
    _add_matmul(block[..., stop:, :], r[..., start:stop, stop:].mT, errors, alpha=-1)


def _add_matmul(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1) -> None:
    """Add alpha `a` @ `b` to `out`, of one problem or of a batch."""
    (out.addmm_ if out.ndim == 2 else out.baddbmm_)(a, b, alpha=alpha)


def _subtract_outer(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Subtract `a` [..., n] times `b` [..., rows] from `out` [..., n, rows]."""
    if out.ndim == 2:
        out.addr_(a, b, alpha=-1)
    else:  # a rank-1 matmul per problem would be slower
        out.addcmul_(a.unsqueeze(-1), b.unsqueeze(-2), value=-1)
