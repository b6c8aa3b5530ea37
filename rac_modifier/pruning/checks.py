"""Checks of the arguments of a solver, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch

from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import Method


def is_finite(x: torch.Tensor) -> bool:
    """Whether every element is finite. A finite sum proves it and is far cheaper; the sum itself can overflow."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def check_settings(
    method: str, block_size: int, dampening_frac: float, iterations: int, refit_steps: int
) -> None:
    """Refuse settings that cannot work.

    Raises:
        RacError: naming the setting and its value.
    """
    if method not in get_args(Method):
        raise RacError(
            f"pruning method {method!r}: unknown; choose from {', '.join(get_args(Method))}"
        )
    if block_size < 1:
        raise RacError(f"block_size {block_size}: must be at least 1; 128 is usual")
    if iterations < 1:
        raise RacError(f"iterations {iterations}: ALPS needs at least 1; 12 is usual")
    if refit_steps < 0:
        raise RacError(
            f"refit_steps {refit_steps}: must not be negative; 10 is usual, refit=False turns the refit off"
        )
    if not (dampening_frac >= 0 and math.isfinite(dampening_frac)):
        raise RacError(f"dampening_frac {dampening_frac}: must be finite and >= 0; 0.01 is usual")


def check_weights(weights: Sequence[torch.Tensor], names: Sequence[str], d: int) -> None:
    """Refuse weights that are not all [rows_i, d], finite and of one dtype.

    Raises:
        RacError: naming the module.
    """
    if not weights or len(weights) != len(names):
        raise RacError(f"{len(weights)} weights, {len(names)} names: give one of each per module")
    for name, w in zip(names, weights, strict=True):
        if w.ndim != 2 or w.shape[1] != d:
            raise RacError(
                f"{name}: weight {list(w.shape)} and a Hessian of {d} inputs do not fit together; only modules that read the "
                "same input share a Hessian"
            )
        if w.dtype != weights[0].dtype:
            raise RacError(
                f"{name}: {w.dtype} beside {weights[0].dtype}; solve modules of different dtypes separately"
            )
        if not is_finite(w):
            raise RacError(
                f"{name}: the weight holds values that are not finite; check the checkpoint"
            )


def check_cross_moment(
    cross_moment: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], names: Sequence[str]
) -> None:
    """Refuse cross moments that do not have the shapes of the weights, or are not finite.

    Raises:
        RacError: naming the module.
    """
    if len(cross_moment) != len(weights):
        raise RacError(
            f"{len(cross_moment)} cross moments, {len(weights)} weights: give one of each per module"
        )
    for name, c, w in zip(names, cross_moment, weights, strict=True):
        if c.shape != w.shape:
            raise RacError(
                f"{name}: cross moment {list(c.shape)} and weight {list(w.shape)} must have the same shape"
            )
        if not is_finite(c):
            raise RacError(
                f"{name}: the cross moment holds values that are not finite; check the activations of this layer"
            )


def check_hessian(hessian: torch.Tensor, label: str) -> None:
    """Refuse what is not a second moment: not square or float32, not finite, a diagonal with a negative value or all zero.

    Raises:
        RacError: naming `label`.
    """
    d = hessian.shape[0]
    if hessian.shape != (d, d) or not hessian.is_floating_point() or hessian.element_size() < 4:
        raise RacError(
            f"{label}: Hessian {list(hessian.shape)} of {hessian.dtype}; it must be square and float32"
        )
    if not is_finite(hessian):
        raise RacError(
            f"{label}: the Hessian holds values that are not finite; check the activations of this layer"
        )
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()) or not bool((diagonal > 0).any()):
        raise RacError(
            f"{label}: the diagonal of the Hessian is between {float(diagonal.min()):.4g} and {float(diagonal.max()):.4g}; "
            "it holds sums of squares of inputs, which are positive if there were tokens: check the calibration traces"
        )


def check_patterns(
    weights: Sequence[torch.Tensor], names: Sequence[str], patterns: Sequence[Pattern]
) -> None:
    """Refuse modules that cannot hold their patterns, and an N:M that is not the same for all (RacError)."""
    if len(patterns) != len(weights) or any(
        p.mask_structure != patterns[0].mask_structure for p in patterns
    ):
        raise RacError(
            f"{', '.join(names)}: {len(patterns)} patterns with mask_structure {sorted({p.mask_structure for p in patterns})}; "
            "modules that are solved together need one pattern each: the same N:M, or all unstructured"
        )
    for name, w, pattern in zip(names, weights, patterns, strict=True):
        pattern.check_shape(name, *w.shape)
