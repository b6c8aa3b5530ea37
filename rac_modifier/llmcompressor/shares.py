"""How much of each module is pruned, so that all of them together lose exactly the share that was asked for.

Unstructured patterns only: an N:M pattern fixes every module's share. A plan is a number of weights a module; the numbers
add up to floor(all weights * sparsity), and a `Pattern` made of one prunes that many with ALPS (SparseGPT rounds down once
a block of columns, as ever).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern

_AGREEMENT = 1e-3  # between the average of a list that names every module and the sparsity asked for
_HALF = 0.5  # of the way from uniform to the optimum


@dataclass(frozen=True)
class Sensitivity:
    """What pruning one module alone does to the model's predictions.

    Attributes:
        weights: how many the module has.
        kl: nats a token, from the dense model, when `sparsity` of the module's weights are pruned by score.
        thresholds: the score below which a share k / (len - 1) of its weights lie, ascending.
        lost: the sum of the pruned weights' scores.
    """

    weights: int
    kl: float
    thresholds: Sequence[float]
    lost: float


def patterns_for(shares: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, Pattern]:
    """One unstructured pattern a module from wanted `shares`, which are rounded so that the total is exact.

    Largest remainders are rounded up until floor(sum(sizes) * sparsity) weights are given out.
    """
    budget = math.floor(sum(sizes.values()) * sparsity)
    wanted = {name: shares[name] * size for name, size in sizes.items()}
    counts = {name: min(max(math.floor(count), 1), sizes[name] - 1) for name, count in wanted.items()}
    by_need = sorted(sizes, key=lambda name: counts[name] - wanted[name])
    left = budget - sum(counts.values())
    while left:
        step = 1 if left > 0 else -1
        able = [name for name in by_need[::step] if 1 <= counts[name] + step < sizes[name]]
        if not able:
            raise RacError(f"sparsity {sparsity} leaves some of {len(sizes)} modules without a weight; lower it")
        for name in able[: abs(left)]:
            counts[name] += step
        left = budget - sum(counts.values())
    # the next float above: a rounded quotient may lie below it, and its product with the size be cut to one less
    return {name: Pattern.unstructured(math.nextafter(count / sizes[name], 1.0)) for name, count in counts.items()}


def listed_shares(given: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """The shares of a list, and for modules that are not on it the one share that makes the average `sparsity`.

    Raises:
        RacError: nothing is left over for the other modules, or a list of all of them averages something else.
    """
    total, taken = sum(sizes.values()), sum(sizes[name] * share for name, share in given.items())
    rest = total - sum(sizes[name] for name in given)
    if not rest:
        if abs(taken / total - sparsity) > _AGREEMENT:
            raise RacError(
                f"allocation names every module and prunes {taken / total:.4f} of their weights, but sparsity is {sparsity}: "
                "set that sparsity, or leave modules out, which then take what is missing"
            )
        return dict(given)
    share = (total * sparsity - taken) / rest
    if not 0.0 < share < 1.0:
        raise RacError(
            f"allocation leaves the {len(sizes) - len(given)} modules that it does not name a share of {share:.3f} to make the "
            f"average {sparsity}; it must lie between 0 and 1: change the shares or the sparsity"
        )
    return {name: given.get(name, share) for name in sizes}


def sensitive_shares(found: Mapping[str, Sensitivity], sparsity: float) -> dict[str, float]:
    """Half-way from uniform to the shares that minimise the sum of the modules' KL.

    A module's KL is taken to grow as the sum of its pruned weights' scores does, KL_m(s) = a_m * lost_m(s) with the measured
    a_m = kl / lost. At the minimum all modules share one threshold of a_m * score. Half-way, since modules do not err
    independently and the measure is of one module at a time.
    """
    price = {name: max(s.kl, 1e-12) / max(s.lost, 1e-30) for name, s in found.items()}
    total = sum(s.weights for s in found.values())

    def shares_at(threshold: float) -> dict[str, float]:
        return {name: _share_below(s.thresholds, threshold / price[name]) for name, s in found.items()}

    low, high = 0.0, max(s.thresholds[-1] * price[name] for name, s in found.items())
    for _ in range(100):
        middle = (low + high) / 2
        share = sum(found[name].weights * x for name, x in shares_at(middle).items()) / total
        low, high = (middle, high) if share < sparsity else (low, middle)
    best = shares_at(high)
    return {name: sparsity + _HALF * (best[name] - sparsity) for name in found}


def _share_below(thresholds: Sequence[float], value: float) -> float:
    """The share of scores below `value`, linear between the thresholds."""
    above = bisect.bisect_right(thresholds, value)
    steps = len(thresholds) - 1
    if above == 0:
        return 0.0
    if above > steps:
        return 1.0
    below, next_ = thresholds[above - 1], thresholds[above]
    return (above - 1 + (value - below) / (next_ - below)) / steps
