"""Refit: the best values of the kept weights, with the mask fixed.

For each output row w with kept columns S it minimises (w - t) H (w - t)^T over w_S. The normal equations are
H_SS w_S = (H t^T)_S. Solving them exactly takes one factorisation of H_SS per row, |S|^3 / 3 operations. Conjugate
gradients restricted to S need one product with H per step, the same H for all rows of all modules: 2 d^2 operations per row
and step. Few steps are enough, because the pruned weights are a good start (ALPS, arXiv 2406.07831, section 3.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rac_modifier.platform import add_matmul_
from rac_modifier.pruning import linalg
from rac_modifier.pruning.linalg import Dampening

STEPS = 20
# Largest residual of a row that is finished, relative to its target. With 5e-3 the error of some rows is 5 % above the least
# possible on the reasoner's layers.
TOLERANCE = 1e-3
# Smallest gain of a step that is followed by another, relative to the error after it. After ALPS on the reasoner's layers 0.3 %
# takes 1 to 7 steps, with an error 0.1 to 0.4 % above that of 0.1 %; 1 % takes 1 to 4 steps, 0.4 to 0.9 % above.
GAIN = 3e-3
LARGE = 2048  # inputs from which the first gradient is rounded too


@dataclass(frozen=True)
class Refit:
    """What a refit did.

    Attributes:
        steps: each one product with H.
        residual: the largest relative residual of a row at the end.
        errors: [rows], (w - t) H (w - t)^T of each row at the end under the damped Hessian: that at the start, less what each
            step lowered it by.
    """

    steps: int
    residual: float
    errors: torch.Tensor


def refit(
    weight: torch.Tensor,
    pruned: torch.Tensor,
    target: torch.Tensor,
    hessian: torch.Tensor,
    dampening: Dampening,
    *,
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
    gain: float = GAIN,
    bf16: bool = False,
) -> Refit:
    """Refit `weight` [d, rows] (transposed, modules side by side) in place, towards `target` [d, rows], which is overwritten.

    `pruned` is bool [d, rows], True = stays zero. The error under the damped Hessian falls with every step; its diagonal D
    is the preconditioner. The relative residual of a row with gradient g and target t is ||D^-1/2 g|| / ||D^1/2 t||. The
    refit ends when all rows are below `tolerance`, after a step that lowered the errors of the rows by less than `gain` of each
    on average, or after `steps`. It needs two buffers of [d, rows] in the dtype of the Hessian, one in that of the products, and
    the memory of `target`, which is gone after that. Passes over memory go through a few inputs at a time.

    `bf16` (linalg.py) rounds the products of the steps. They are few and short, so the error changes by 0.2 % on layers of the
    reasoner and of SmolLM2. With `LARGE` inputs or more the first gradient is rounded too: what `errors` says is then 0.06 % off
    with 9,472 random inputs. With fewer, fewer roundings cancel (0.3 % with 1,536 of SmolLM2).
    """
    weight.masked_fill_(pruned, 0.0)
    added, inverse = dampening.added.unsqueeze(1), dampening.diagonal.reciprocal().unsqueeze(1)
    parts = linalg.parts(weight)
    whole, error, energy = (weight.new_zeros(weight.shape[1]) for _ in range(3))
    for here in parts:
        whole += (target[here] * target[here]).mul_(dampening.diagonal[here].unsqueeze(1)).sum(0)
    direction = target.sub_(weight)
    residual, rounded = torch.mul(direction, added), hessian.bfloat16() if bf16 else hessian
    if bf16 and len(hessian) >= LARGE:
        factor = direction.bfloat16()
        for some in linalg.row_blocks(weight):
            residual[some].add_(rounded[some] @ factor)
    else:
        add_matmul_(residual, hessian, direction)
    for here in parts:
        error += (direction[here] * residual[here]).sum(0)
        residual[here].masked_fill_(pruned[here], 0.0)
        torch.mul(residual[here], inverse[here], out=direction[here])
        energy += (residual[here] * direction[here]).sum(0)
    product = torch.empty_like(weight)
    goal = tolerance**2 * whole
    step, gained = 0, math.inf
    while step < steps and gained >= gain and bool((energy > goal).any()):
        factor = direction.bfloat16() if bf16 else direction
        curvature, left = torch.zeros_like(energy), torch.zeros_like(energy)
        for some in linalg.row_blocks(weight):
            found = rounded[some] @ factor
            for inner in linalg.parts(found):
                here = slice(some.start + inner.start, some.start + inner.stop)
                torch.mul(direction[here], added[here], out=product[here]).add_(found[inner])
                product[here].masked_fill_(pruned[here], 0.0)
                curvature += (direction[here] * product[here]).sum(0)
            del found  # before the next is made
        # rows that are finished do not move, and neither do rows that would diverge because the Hessian is indefinite
        length = torch.where((energy > goal) & (curvature > 0), energy / curvature, 0.0)
        lowered = length * energy
        error -= lowered
        gained = float(torch.where(error > 0, lowered / error, 0.0).mean())
        for here in parts:
            weight[here].addcmul_(direction[here], length)
            residual[here].addcmul_(product[here], length, value=-1)
            left += (
                torch.mul(residual[here], inverse[here], out=product[here])
                .mul_(residual[here])
                .sum(0)
            )
        kept = torch.where(energy > 0, left / energy, 0.0)
        for here in parts:
            direction[here].mul_(kept).addcmul_(residual[here], inverse[here])
        energy = left
        step += 1
    return Refit(
        step,
        float(torch.where(energy > 0, energy / whole, 0.0).max().sqrt()),
        error.clamp_(min=0.0),
    )


def errors_as_stored(
    fitted: Refit | None,
    weight: torch.Tensor,
    stored: torch.Tensor,
    target: torch.Tensor,
    hessian: torch.Tensor,
    dampening: Dampening,
) -> torch.Tensor:
    """(w - t) H (w - t)^T of each row, for w as `stored` of `weight`, all [d, rows]; float64 [rows]. `target` is overwritten.

    After a refit that was `fitted` no further product is needed: it is the refit's error less the share of the dampening. A refit
    leaves little of the gradient, and rounding is random, so what is lost by rounding to the dtype that is stored is its own
    quadratic form. A test holds the result within 0.2 %; with fewer tokens than inputs it was 0.5 % too low.
    """
    if fitted is None:
        return linalg.quadratic_form(target.sub_(stored), hessian)
    errors = fitted.errors.double() - target.sub_(weight).square_().mul_(
        dampening.added.unsqueeze(1)
    ).sum(0)
    return (
        errors
        if stored is weight
        else errors + linalg.quadratic_form(stored.sub_(weight), hessian, bf16=True)
    )
