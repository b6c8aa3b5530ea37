"""The dense target: the weights to reconstruct so that a pruned layer also makes up for what was lost before it.

Sequential pruning minimises ||W X_p - W' X_p||, with X_p the pruned model's inputs, and so keeps the errors that are in X_p
already. Aim at what the dense model computed, min over W' of ||W X_d - W' X_p||: its solution without any pattern is

    W* = W + R X_p^T (X_p X_p^T + lambda I)^-1,    R = W (X_d - X_p),

and up to a constant the distance is (W* - W') X_p X_p^T (W* - W')^T, so every solver serves unchanged with W* as its target
(asymmetric calibration, as in GPTAQ, arXiv 2504.02692). lambda keeps W* at W where the inputs say little.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning.checks import check_dampening, check_hessian, check_weights, is_finite
from rac_modifier.pruning.sparsegpt import Factor, factorise


@torch.no_grad()
def target_weights(
    weights: Sequence[torch.Tensor],
    drift: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    dampening_frac: float,
    names: Sequence[str],
    *,
    factor: Factor | None = None,
) -> list[torch.Tensor]:
    """W* of modules that read the same input: each `weights` [rows_i, d] plus `drift` (H + lambda I)^-1.

    `drift` holds R X_p^T of each module, [rows_i, d] on the scale of `hessian` (statistics.py); lambda is `dampening_frac`
    of H's mean diagonal. d^3 / 3 operations for the Cholesky factor, shared by the modules, and d^2 a row. `factor`
    (sparsegpt.factorise) saves the first and tells whether the dampening had to be raised: give the same one to `solve`,
    which records that.

    Returns:
        New tensors in the Hessian's dtype and on its device.

    Raises:
        RacError: shapes that do not fit, values that are not finite, or a Hessian that cannot be factored.
    """
    label = ", ".join(names)
    check_dampening(dampening_frac)
    check_weights(weights, drift, names, hessian.shape[0])
    check_hessian(hessian, label)
    if factor is None:
        factor = factorise(hessian, dampening_frac, label)
    flipped = torch.cat([part.to(hessian) for part in drift]).T.flip(
        0
    )  # the factor runs from the last input to the first
    moves = torch.cholesky_solve(flipped, factor.reversed_lower).flip(0).T
    targets = []
    for name, w, move in zip(names, weights, moves.split([w.shape[0] for w in weights]), strict=True):
        target = w.to(hessian) + move
        if not is_finite(target):
            raise RacError(f"{name}: the dense target overflows; raise dampening_frac ({dampening_frac})")
        targets.append(target)
    return targets
