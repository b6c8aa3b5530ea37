"""Dampening: what is added to a Hessian's diagonal so that it can be inverted, and when to add more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from rac_modifier.errors import RacError

# Retries multiply the dampening by ten up to the mean of the diagonal; beyond that the Hessian would hardly matter and
# the result would be magnitude pruning under another name.
MAX_DAMPENING = 1.0
_FIRST_RETRY = 1e-4  # when dampening_frac is 0

T = TypeVar("T")


@dataclass(frozen=True)
class Dampening:
    """`frac` of the mean of H's diagonal, `added` [d] to it; inputs that never fired get the mean itself on top.

    `diagonal` [d] is what results, positive everywhere: the diagonal that scales a layer problem.
    """

    frac: float
    added: torch.Tensor
    diagonal: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, frac: float) -> Dampening:
        """For a Hessian [d, d] whose diagonal is nowhere negative and somewhere positive."""
        diagonal = hessian.diagonal()
        mean = diagonal.mean()
        added = torch.where(diagonal == 0, mean, torch.zeros_like(mean)) + frac * mean
        return cls(frac, added, diagonal + added)


def raise_until_it_works(attempt: Callable[[float], T | None], frac: float, label: str) -> tuple[T, float, int]:
    """`attempt(frac)`, with the dampening raised tenfold as long as it returns None.

    Returns:
        What it returned, the dampening that took and the number of raises.

    Raises:
        RacError: naming `label`, when not even the mean of the diagonal is enough.
    """
    retries = 0
    while True:
        result = attempt(frac)
        if result is not None:
            return result, frac, retries
        larger = max(frac * 10, _FIRST_RETRY)
        if larger > MAX_DAMPENING * (1 + 1e-9):
            raise RacError(
                f"{label}: the Hessian is not positive definite, even with dampening_frac {frac:.4g}; "
                "use more calibration tokens, or look for activations that overflow in this layer"
            )
        frac, retries = larger, retries + 1
