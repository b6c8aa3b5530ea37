"""How much the tokens of a trace count in a Hessian: a factor for each trace as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable

from rac_modifier.errors import RacError
from rac_modifier.traces.records import Trace

Weighting = Callable[[Trace], float]


def find_weighting(
    weighting: str | Weighting, is_right: Callable[[Trace], bool]
) -> Weighting | None:
    """The function that gives each trace its factor; None where the factor is 1 for all.

    Args:
        weighting: "uniform", "inverse_length" or "correct", or a function of a `Trace` that returns a number of at least 0.
        is_right: whether a trace's answer is right; called for "correct" only.

    Raises:
        RacError: another name; from the function that is returned: a weight that is negative or no finite number.
    """
    if callable(weighting):
        return lambda trace: _checked(weighting(trace), weighting, trace)
    if weighting == "uniform":
        return None
    if weighting == "inverse_length":
        return lambda trace: 1 / trace.tokens
    if weighting == "correct":
        return lambda trace: float(is_right(trace))
    raise RacError(
        f"trace_weighting is {weighting!r}; use uniform, inverse_length or correct, or from Python a function of a trace"
    )


def _checked(weight: object, weighting: Weighting, trace: Trace) -> float:
    if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
        name = getattr(weighting, "__qualname__", repr(weighting))
        raise RacError(
            f"trace_weighting {name} gives trace {trace.id!r} the weight {weight!r}; return a number of at least 0"
        )
    return float(weight)


def mean_one_factor(weights: list[tuple[float, int]]) -> float:
    """The factor that gives (weight, tokens) pairs a mean of 1 per token, so that traces keep their share beside other parts.

    Raises:
        RacError: all weights are 0.
    """
    total = sum(weight * tokens for weight, tokens in weights)
    if total == 0:
        raise RacError(
            "every trace of the calibration set weighs 0, so none would count; set another trace_weighting"
        )
    return sum(tokens for _, tokens in weights) / total
