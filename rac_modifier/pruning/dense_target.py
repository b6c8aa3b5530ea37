"""The dense target: weights W* with which a pruned layer also corrects the errors of the layers before it.

Sequential pruning minimises ||W X_p - W' X_p||, where X_p are the inputs in the pruned model. The errors that X_p already has
remain. The dense target aims at the output of the dense model instead, min over W' of ||W X_d - W' X_p||. Without a
pattern the solution is

    W* = W + C (H + lambda I)^-1,    H = X_p X_p^T,    C = W (X_d - X_p) X_p^T,

with H and C both scaled and weighted as in hessian.py. Up to a constant, the distance is (W* - W') H (W* - W')^T.
So every solver works unchanged with W* as its target (asymmetric calibration, as in GPTAQ, arXiv 2504.02692).
lambda keeps W* close to W where the inputs carry little information.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning.checks import is_finite
from rac_modifier.pruning.linalg import Factor


def target_weights(
    weights: Sequence[torch.Tensor],
    cross_moment: Sequence[torch.Tensor],
    factor: Factor,
    names: Sequence[str],
) -> list[torch.Tensor]:
    """W* of modules that read the same input, from `weights` and `cross_moment`, each [rows_i, d], and the damped H's `factor`.

    Returns:
        New tensors in the dtype of the factor and on its device.

    Raises:
        RacError: a target that overflows.
    """
    moves = factor.solve(torch.cat([c.to(factor.reversed_lower) for c in cross_moment]))
    targets = []
    for name, w, move in zip(
        names, weights, moves.split([w.shape[0] for w in weights]), strict=True
    ):
        target = w.to(move) + move
        if not is_finite(target):
            frac = factor.dampening.frac
            raise RacError(f"{name}: the dense target overflows; raise dampening_frac ({frac:.4g})")
        targets.append(target)
    return targets
