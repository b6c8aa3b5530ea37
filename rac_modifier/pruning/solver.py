"""The one way in: weights and a Hessian, a method and a pattern; out come pruned weights and how much they err."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning import sparsegpt
from rac_modifier.pruning.patterns import Pattern
from rac_modifier.pruning.scores import magnitude_mask, wanda_mask

Method = Literal["sparsegpt", "wanda", "magnitude"]

_QUADRATIC_BLOCK = 256


@dataclass(frozen=True)
class Solution:
    """A pruned module.

    Attributes:
        weight: [rows, columns] in the dtype and on the device of the weight given.
        mask: bool [rows, columns], True = kept. What the method chose; a kept weight may still round to zero.
        error: ||(W - W') X||^2 as the Hessian H has it, trace((W - W') H (W - W')^T), for W' as stored, W the target.
        relative_error: error / trace(W H W^T); 0 when both are 0.
        dampening_used: the dampening_frac that the factorisation took; 0 for methods that factor nothing.
        retries: how often the dampening was raised to get there.
        dead_inputs: input columns that are 0 on every calibration token.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    error: float
    relative_error: float
    dampening_used: float
    retries: int
    dead_inputs: int


@torch.no_grad()
def solve(
    method: Method,
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    pattern: Pattern,
    *,
    names: Sequence[str] | None = None,
    block_size: int = 128,
    dampening_frac: float = 0.01,
    target: Sequence[torch.Tensor] | None = None,
) -> list[Solution]:
    """Prune modules that read the same input: `weights`, each [rows_i, d], share `hessian` [d, d] (float32, symmetric).

    Each gets what it would get alone; stacking only saves time. The arithmetic is float32, on the Hessian's device.
    `target` holds the weights to reconstruct, shaped like `weights` (default: the weights themselves); `names` are for
    messages. SparseGPT zeroes inputs that are dead; Wanda and magnitude leave the weights they keep untouched.

    Raises:
        RacError: shapes, numbers or a pattern that cannot work, values that are not finite, or a Hessian that cannot be
            factored. SparseGPT never falls back to magnitude.
    """
    names = [f"weight {i}" for i in range(len(weights))] if names is None else names
    targets = weights if target is None else target
    _check(method, weights, targets, hessian, pattern, names, block_size, dampening_frac)
    rows, dtype = [w.shape[0] for w in weights], weights[0].dtype
    dead = hessian.diagonal() == 0
    working = _stacked(targets, hessian)
    totals = quadratic_form(working, hessian)

    dampening, retries = 0.0, 0
    if method == "sparsegpt":
        factor = sparsegpt.factorise(hessian, dampening_frac, ", ".join(names))
        dampening, retries = factor.dampening_frac, factor.retries
        working[dead] = 0.0
        pruned, errors = sparsegpt.prune(working, factor, rows, pattern, block_size)
        pruned[dead] = True
        del factor
    else:
        pruned, errors = _pruned_by_score(method, working, rows, hessian, pattern), None
        working.masked_fill_(pruned, 0.0)
    if errors is None or dtype != working.dtype:  # SparseGPT's own errors know nothing of rounding
        stored = working.to(dtype).to(working.dtype)
        errors = quadratic_form(_stacked(targets, hessian).sub_(stored), hessian)

    solutions = []
    for i, (name, w) in enumerate(zip(names, weights, strict=True)):
        part = slice(sum(rows[:i]), sum(rows[: i + 1]))
        weight = working[:, part].T.contiguous().to(w)
        if not _finite(weight):
            raise RacError(f"{name}: the pruned weight overflows {w.dtype}; raise dampening_frac ({dampening_frac})")
        # rounding may leave an error of nothing just below 0
        error, total = max(float(errors[part].sum()), 0.0), float(totals[part].sum())
        solutions.append(
            Solution(
                weight=weight,
                mask=pruned[:, part].T.logical_not().contiguous().to(w.device),
                error=error,
                relative_error=error / total if total > 0 else 0.0,
                dampening_used=dampening,
                retries=retries,
                dead_inputs=int(dead.sum()),
            )
        )
    return solutions


def quadratic_form(vectors: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """v^T H v for each column v of `vectors` [d, rows] and symmetric H [d, d]; float64 [rows].

    Uses the lower triangle and counts what is left of the diagonal blocks twice: half the work of a full product.
    """
    result = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for start in range(0, vectors.shape[0], _QUADRATIC_BLOCK):
        block = slice(start, start + _QUADRATIC_BLOCK)
        product = hessian[block, block] @ vectors[block]
        if start:
            product.addmm_(hessian[block, :start], vectors[:start], alpha=2)
        result += product.mul_(vectors[block]).sum(0)
    return result


def _stacked(weights: Sequence[torch.Tensor], hessian: torch.Tensor) -> torch.Tensor:
    """All weights side by side and transposed, [d, sum(rows)], in the Hessian's dtype; sparsegpt.py says why."""
    stacked = hessian.new_empty(hessian.shape[0], sum(w.shape[0] for w in weights))
    for part, w in zip(stacked.split([w.shape[0] for w in weights], dim=1), weights, strict=True):
        part.copy_(w.T)
    return stacked


def _pruned_by_score(
    method: str, working: torch.Tensor, rows: Sequence[int], hessian: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    """What Wanda or magnitude prunes of transposed weights [d, sum(rows)], each module by itself."""
    masks = []
    for part in working.split(list(rows), dim=1):
        w = part.T.contiguous()
        masks.append(wanda_mask(w, hessian, pattern) if method == "wanda" else magnitude_mask(w, pattern))
    return torch.cat(masks).T


def _finite(x: torch.Tensor) -> bool:
    # the sum is far cheaper, and finite only if every element is; a sum that overflows settles nothing
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _check(
    method: str,
    weights: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    pattern: Pattern,
    names: Sequence[str],
    block_size: int,
    dampening_frac: float,
) -> None:
    if method not in get_args(Method):
        raise RacError(f"pruning method {method!r}: unknown; choose from {', '.join(get_args(Method))}")
    if block_size < 1:
        raise RacError(f"block_size {block_size}: must be at least 1; 128 is usual")
    if not (dampening_frac >= 0 and math.isfinite(dampening_frac)):
        raise RacError(f"dampening_frac {dampening_frac}: must be finite and >= 0; 0.01 is usual")
    if not weights or not len(weights) == len(targets) == len(names):
        raise RacError(f"{len(weights)} weights, {len(targets)} targets, {len(names)} names: give one of each a module")
    label = ", ".join(names)
    d = hessian.shape[0]
    if hessian.shape != (d, d) or not hessian.is_floating_point() or hessian.element_size() < 4:
        raise RacError(f"{label}: Hessian {list(hessian.shape)} of {hessian.dtype}; it must be square and float32")
    for name, w, t in zip(names, weights, targets, strict=True):
        if w.ndim != 2 or w.shape[1] != d or t.shape != w.shape:
            raise RacError(
                f"{name}: weight {list(w.shape)}, target {list(t.shape)} and a Hessian of {d} inputs do not fit "
                "together; only modules that read the same input share a Hessian"
            )
        if w.dtype != weights[0].dtype:
            raise RacError(f"{name}: {w.dtype} beside {weights[0].dtype}; solve modules of different dtypes apart")
        pattern.check_shape(name, *w.shape)
        if not (_finite(w) and _finite(t)):
            raise RacError(f"{name}: the weight holds values that are not finite; check the checkpoint")
    if not _finite(hessian):
        raise RacError(f"{label}: the Hessian holds values that are not finite; check the activations of this layer")
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()) or not bool((diagonal > 0).any()):
        raise RacError(
            f"{label}: the Hessian's diagonal runs from {float(diagonal.min()):.4g} to {float(diagonal.max()):.4g}; "
            "sums of squares of inputs are positive unless no token came by: check the calibration traces"
        )
