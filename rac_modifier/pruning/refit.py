"""Refit: the best values of the kept weights, with the mask fixed.

For each output row w with kept columns S it minimises (w - t) H (w - t)^T over w_S. The normal
equations are H_SS w_S = (H t^T)_S. An exact solution takes a factorisation of H_SS per row,
|S|^3 / 3 operations. Conjugate gradients restricted to S need one matmul with H per step, the same
H for all rows of all modules: 2 d^2 operations per row and step. Few steps are enough, because the
pruned weights are a good start (ALPS, arXiv 2406.07831, section 3.3).
"""

import math

import torch
from torch import Tensor

from rac_modifier.pruning import linalg
from rac_modifier.pruning.linalg import Dampening
from rac_modifier.runtime.cpu_tuning import add_matmul_

# Largest residual of a finished row, relative to its target. 5e-3 leaves the error of some rows
# 5 % above the least possible.
TOLERANCE = 1e-3
# Smallest gain of a step that is followed by another, relative to the error after it. After ALPS
# 0.3 % takes 1 to 7 steps and ends 0.1 to 0.4 % above the error of 0.1 %.
GAIN = 3e-3
LARGE = 2048  # inputs from which the first gradient is rounded too


def refit(
    weight: Tensor,
    pruned: Tensor,
    target: Tensor,
    hessian: Tensor,
    dampening: Dampening,
    *,
    steps: int,
    bf16: bool = False,
) -> int:
    """Refit `weight` [d, rows] (transposed, modules side by side) in place towards `target`.

    The error under the damped Hessian falls with each step; its diagonal D is the preconditioner.
    The relative residual of a row with gradient g and target t is ||D^-1/2 g|| / ||D^1/2 t||. The
    refit ends when all rows are below `TOLERANCE`, after a step that lowered the errors of the
    rows by less than `GAIN` of each on average, or after `steps`.

    `pruned` is True for what stays zero; `target` is overwritten; `hessian` is undamped. `bf16`
    rounds the matmuls of the steps, and with `LARGE` inputs the first gradient: 0.2 % of the error.

    Returns:
        The steps taken, each a matmul with H.
    """
    weight.masked_fill_(pruned, 0.0)
    added, inverse = dampening.added.unsqueeze(1), dampening.diagonal.reciprocal().unsqueeze(1)
    slices = linalg.cached_slices(weight)
    norms, error, energy = (weight.new_zeros(weight.shape[1]) for _ in range(3))
    for part in slices:  # t D t^T
        norms += (target[part] * target[part]).mul_(dampening.diagonal[part].unsqueeze(1)).sum(0)
    # r = H' (t - w), the negative gradient: the dampening's share, then that of H
    direction = target.sub_(weight)
    residual, rounded = torch.mul(direction, added), hessian.bfloat16() if bf16 else hessian
    if bf16 and len(hessian) >= LARGE:
        factor = direction.bfloat16()
        for block in linalg.row_blocks(weight):
            residual[block].add_(rounded[block] @ factor)
    else:
        add_matmul_(residual, hessian, direction)
    for part in slices:
        error += (direction[part] * residual[part]).sum(0)  # (t - w) H' (t - w)^T
        # only the kept columns S move: r <- r_S, p = D^-1 r, and r D^-1 r^T
        residual[part].masked_fill_(pruned[part], 0.0)
        torch.mul(residual[part], inverse[part], out=direction[part])
        energy += (residual[part] * direction[part]).sum(0)
    product = torch.empty_like(weight)
    goal = TOLERANCE**2 * norms
    step, gained = 0, math.inf
    while step < steps and gained >= GAIN and bool((energy > goal).any()):
        # q = (H' p)_S and p H' p^T
        factor = direction.bfloat16() if bf16 else direction
        curvature, remaining = torch.zeros_like(energy), torch.zeros_like(energy)
        for block in linalg.row_blocks(weight):
            image = rounded[block] @ factor
            for inner in linalg.cached_slices(image):
                part = slice(block.start + inner.start, block.start + inner.stop)
                torch.mul(direction[part], added[part], out=product[part]).add_(image[inner])
                product[part].masked_fill_(pruned[part], 0.0)
                curvature += (direction[part] * product[part]).sum(0)
        # a = r D^-1 r^T / p H' p^T, which lowers the error by a r D^-1 r^T; finished rows do not
        # move, nor do rows that an indefinite Hessian would let diverge
        length = torch.where((energy > goal) & (curvature > 0), energy / curvature, 0.0)
        lowered = length * energy
        error -= lowered
        gained = float(torch.where(error > 0, lowered / error, 0.0).mean())
        for part in slices:
            # w <- w + a p, r <- r - a q
            weight[part].addcmul_(direction[part], length)
            residual[part].addcmul_(product[part], length, value=-1)
            scaled = torch.mul(residual[part], inverse[part], out=product[part])
            remaining += scaled.mul_(residual[part]).sum(0)  # of the new r
        # p <- D^-1 r + b p, with b the new r D^-1 r^T over the old one
        ratio = torch.where(energy > 0, remaining / energy, 0.0)
        for part in slices:
            direction[part].mul_(ratio).addcmul_(residual[part], inverse[part])
        energy = remaining
        step += 1
    return step
