"""Refit: the best values of the kept weights on a support that stays as it is.

For each output row w with kept columns S it minimises (w - t) H (w - t)^T over w_S, the normal equations
H_SS w_S = (H t^T)_S. Solving them exactly takes a factorisation of H_SS for each row, |S|^3 / 3 operations. Conjugate
gradients restricted to S need one product with H a step, the same for all rows of all modules: 2 d^2 operations a row
and step, and few steps, since a pruner's weights are a good start (ALPS, arXiv 2406.07831, section 3.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rac_modifier.pruning import narrow
from rac_modifier.pruning.linalg import Dampening

STEPS = 20
# Of the residual, relative to the target; at 5e-3 some rows are 5 % above their least error on the reasoner's layers.
TOLERANCE = 1e-3
# Of a step, relative to the errors that it leaves: 0.3 % ends a refit after ALPS in 1 to 7 steps on the reasoner's layers, 0.1
# to 0.4 % above the error that 0.1 % leaves; 1 % ends it in 1 to 4 steps, 0.4 to 0.9 % above.
GAIN = 3e-3


@dataclass(frozen=True)
class Refit:
    """What a refit did: products with H, `steps`, and the largest relative residual that it left a row with."""

    steps: int
    residual: float


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
    product_dtype: torch.dtype | None = None,
) -> Refit:
    """Refit `weight` [d, rows] (transposed, modules side by side) in place, towards `target` [d, rows].

    `pruned` [d, rows], True = stays zero. The error as the dampened Hessian has it falls with every step; its diagonal D
    is the preconditioner. The relative residual of a row with gradient g and target t is ||D^-1/2 g|| / ||D^1/2 t||. A row
    below `tolerance` rests, whatever the others do; the end is when all rest, after a step that lowered the
    rows' errors by less than `gain` of each on average, or after `steps`. Five buffers of [d, rows], in the Hessian's dtype.

    `product_dtype` (narrow.py) is the type of the products of the steps, not of the first gradient: what rounding does to so few
    short steps is 0.2 % of the error on layers of the reasoner and of SmolLM2.
    """
    keep = pruned.logical_not().to(weight.dtype)
    weight.mul_(keep)
    added, inverse = dampening.added.unsqueeze(1), dampening.diagonal.reciprocal().unsqueeze(1)

    direction = target - weight
    residual = torch.mul(direction, added).addmm_(hessian, direction)
    error = torch.linalg.vecdot(direction, residual, dim=0)
    residual.mul_(keep)
    rounded = hessian.to(product_dtype or hessian.dtype)
    product = torch.mul(residual, inverse)
    energy = torch.linalg.vecdot(residual, product, dim=0)
    whole = torch.linalg.vecdot(target, target * dampening.diagonal.unsqueeze(1), dim=0)
    goal = tolerance**2 * whole
    direction.copy_(product)
    step, gained = 0, math.inf
    while step < steps and gained >= gain and bool((energy > goal).any()):
        torch.mul(direction, added, out=product)
        narrow.add_product(product, rounded, direction, product_dtype).mul_(keep)
        curvature = torch.linalg.vecdot(direction, product, dim=0)
        # a row at rest, or one that an indefinite Hessian would send astray, stays where it is
        length = torch.where((energy > goal) & (curvature > 0), energy / curvature, 0.0)
        weight.addcmul_(direction, length)
        lowered = length * energy
        error -= lowered
        gained = float(torch.where(error > 0, lowered / error, 0.0).mean())
        residual.addcmul_(product, length, value=-1)
        torch.mul(residual, inverse, out=product)
        left = torch.linalg.vecdot(residual, product, dim=0)
        direction.mul_(torch.where(energy > 0, left / energy, 0.0)).add_(product)
        energy = left
        step += 1
    return Refit(step, float(torch.where(energy > 0, energy / whole, 0.0).max().sqrt()))
