"""Checks of a solver's arguments, before anything is computed."""

from collections.abc import Sequence

from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern

_NOT_FINITE = "is not finite everywhere"


def refuse(wrong: bool, message: str) -> None:
    """Raise a RacError with this message if something is wrong."""
    if wrong:
        raise RacError(message)


def is_finite(x: Tensor) -> bool:
    """Return whether all elements are finite; a finite sum proves it, but the sum can overflow."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def check_problem(
    weights: Sequence[Tensor],
    hessian: Tensor,
    names: Sequence[str],
    patterns: Sequence[Pattern] = (),
    cross_moment: Sequence[Tensor] = (),
) -> None:
    """Refuse modules that cannot be solved together with this Hessian (RacError names one)."""
    d, label = hessian.shape[0], ", ".join(names)
    for name, w in zip(names, weights, strict=True):
        fits = w.ndim == 2 and w.shape[1] == d == hessian.shape[1]
        shapes = f"{name}: weight {list(w.shape)} and Hessian {list(hessian.shape)}"
        refuse(not fits, f"{shapes} do not fit together; use a Hessian of this module's inputs")
        dtypes = f"{name}: {w.dtype} next to {weights[0].dtype}"
        refuse(w.dtype != weights[0].dtype, f"{dtypes}; solve these modules separately")
        refuse(not is_finite(w), f"{name}: the weight {_NOT_FINITE}; check the checkpoint")
    activations = f"{_NOT_FINITE}; check the activations of this layer"
    for name, c in zip(names, cross_moment, strict=False):
        refuse(not is_finite(c), f"{name}: the cross moment {activations}")
    structures = [pattern.mask_structure for pattern in patterns]
    together = "modules that are solved together need the same N:M, or are all unstructured"
    refuse(len(set(structures)) > 1, f"{label}: patterns {', '.join(structures)}; {together}")
    for name, w, pattern in zip(names, weights, patterns, strict=False):
        pattern.check_shape(name, *w.shape)
    refuse(not is_finite(hessian), f"{label}: the Hessian {activations}")
    least, most = float(hessian.diagonal().min()), float(hessian.diagonal().max())
    refuse(
        least < 0 or most <= 0,
        f"{label}: the diagonal of the Hessian is between {least:.4g} and {most:.4g}; it holds "
        "sums of squares of inputs, which are positive if there were tokens: check the "
        "calibration traces",
    )
