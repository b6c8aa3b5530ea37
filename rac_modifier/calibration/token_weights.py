"""The factor by which all tokens of a trace count in a Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable

from rac_modifier.errors import RacError
from rac_modifier.traces.records import Trace

Weighting = Callable[[Trace], float]


def find_weighting(
    weighting: str | Weighting, is_right: Callable[[Trace], bool]
) -> Weighting | None:
    """Return the function that gives each trace its factor; None if the factor is 1 for all.

    The function raises a RacError for a weight that is negative or no finite number.

    Args:
        weighting: a name that the settings allow, or a function of a `Trace` that returns its weight.
        is_right: whether a trace's answer is right; called for "correct" only.
    """
    if callable(weighting):
        return lambda trace: _checked(weighting(trace), weighting, trace)
    named: dict[str, Weighting | None] = {
        "uniform": None,
        "inverse_length": lambda trace: 1 / trace.tokens,
        "correct": lambda trace: float(is_right(trace)),
    }
    return named[weighting]


def _checked(weight: object, weighting: Weighting, trace: Trace) -> float:
    if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
        name = getattr(weighting, "__qualname__", repr(weighting))
        raise RacError(
            f"trace_weighting {name} gives trace {trace.id!r} the weight {weight!r}; return a number of at least 0"
        )
    return float(weight)


def mean_one_factor(weights: list[tuple[float, int]]) -> float:
    """Return the factor that gives (weight, tokens) pairs a mean weight of 1 per token.

    So traces keep their share next to the other parts of a mixture.

    Raises:
        RacError: all weights are 0.
    """
    total = sum(weight * tokens for weight, tokens in weights)
    if total == 0:
        raise RacError(
            "every trace of the calibration set weighs 0, so none would count; set another trace_weighting"
        )
    return sum(tokens for _, tokens in weights) / total
