"""Checks of a solver's arguments, before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch

from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import Method


def is_finite(x: torch.Tensor) -> bool:
    """Return whether all elements are finite; a finite sum proves it, but the sum can overflow."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def check_settings(
    method: str, block_size: int, dampening_frac: float, iterations: int, refit_steps: int
) -> None:
    """Refuse settings that cannot work; the RacError names the setting and its value."""
    methods = get_args(Method)
    if method not in methods:
        raise RacError(f"pruning method {method!r}: unknown; choose from {', '.join(methods)}")
    for name, value, least, usual in (
        ("block_size", block_size, 1, 128),
        ("iterations", iterations, 1, 12),
        ("refit_steps", refit_steps, 0, 10),
    ):
        if value < least:
            raise RacError(f"{name} {value}: must be at least {least}; {usual} is usual")
    if not 0 <= dampening_frac < math.inf:
        raise RacError(f"dampening_frac {dampening_frac}: must be finite and >= 0; 0.01 is usual")


def check_problem(
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    names: Sequence[str],
    patterns: Sequence[Pattern] | None = None,
    cross_moment: Sequence[torch.Tensor] | None = None,
) -> None:
    """Refuse modules that cannot be solved together with this Hessian.

    Raises:
        RacError: naming the module, for shapes, dtypes, patterns or values that cannot work.
    """
    d, label = hessian.shape[0], ", ".join(names)
    if hessian.shape != (d, d) or not hessian.is_floating_point() or hessian.element_size() < 4:
        raise RacError(
            f"{label}: Hessian {list(hessian.shape)} of {hessian.dtype}; it must be square "
            "and float32"
        )
    for kind, members in (
        ("weights", weights),
        ("patterns", patterns),
        ("cross moments", cross_moment),
    ):
        if members is not None and (len(members) != len(names) or not names):
            raise RacError(f"{len(members)} {kind}, {len(names)} names: give one per module")
    for name, w in zip(names, weights, strict=True):
        if w.ndim != 2 or w.shape[1] != d:
            raise RacError(
                f"{name}: weight {list(w.shape)} and a Hessian of {d} inputs do not fit together; "
                "only modules that read the same input share a Hessian"
            )
        if w.dtype != weights[0].dtype:
            raise RacError(
                f"{name}: {w.dtype} next to {weights[0].dtype}; solve modules of different dtypes "
                "separately"
            )
        if not is_finite(w):
            raise RacError(f"{name}: the weight is not finite everywhere; check the checkpoint")
    for name, c, w in zip(names, cross_moment or (), weights, strict=False):
        if c.shape != w.shape:
            raise RacError(
                f"{name}: cross moment {list(c.shape)} and weight {list(w.shape)} must have the "
                "same shape"
            )
        if not is_finite(c):
            raise RacError(
                f"{name}: the cross moment is not finite everywhere; check the activations of this "
                "layer"
            )
    if len({p.mask_structure for p in patterns or ()}) > 1:
        raise RacError(
            f"{label}: patterns {', '.join(p.mask_structure for p in patterns or ())}; modules "
            "that are solved together need the same N:M, or are all unstructured"
        )
    for name, w, pattern in zip(names, weights, patterns or (), strict=False):
        pattern.check_shape(name, *w.shape)
    if not is_finite(hessian):
        raise RacError(
            f"{label}: the Hessian is not finite everywhere; check the activations of this layer"
        )
    diagonal = hessian.diagonal()
    if bool((diagonal < 0).any()) or not bool((diagonal > 0).any()):
        raise RacError(
            f"{label}: the diagonal of the Hessian is between {float(diagonal.min()):.4g} and "
            f"{float(diagonal.max()):.4g}; it holds sums of squares of inputs, which are positive "
            "if there were tokens: check the calibration traces"
        )
