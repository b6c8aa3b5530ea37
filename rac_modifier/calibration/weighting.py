"""What each trace weighs as a whole, beside the weights of its kinds of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import name_of_weighting
from rac_modifier.traces.records import Trace

Weighting = Callable[[Trace], float]


def find_weighting(weighting: str | Callable[..., float], is_right: Callable[[Trace], bool]) -> Weighting | None:
    """The weighting of that name, or the function itself with its results checked; None where every trace weighs 1.

    Args:
        weighting: as `CalibrationSettings.trace_weighting` has checked it; a function returns the weight of a `Trace`,
            at least 0.
        is_right: whether a trace's answer is right; called for "correct" only.
    """
    if callable(weighting):
        function = weighting
        return lambda trace: _checked(function(trace), name_of_weighting(function), trace)
    if weighting == "uniform":
        return None
    if weighting == "inverse_length":
        return lambda trace: 1 / trace.tokens
    assert weighting == "correct", weighting
    return lambda trace: float(is_right(trace))


def _checked(weight: object, name: str, trace: Trace) -> float:
    if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
        raise RacError(
            f"trace_weighting {name!r} gives trace {trace.id!r} the weight {weight!r}; return a number of at least 0"
        )
    return float(weight)


def scaled(weights: list[tuple[float, int]]) -> float:
    """The factor that gives (weight, tokens) pairs a mean of 1 per token, so that traces keep their share beside other parts.

    Raises:
        RacError: all of them are 0.
    """
    total = sum(weight * tokens for weight, tokens in weights)
    if total == 0:
        raise RacError("every trace of the calibration set weighs 0, so none would count; set another trace_weighting")
    return sum(tokens for _, tokens in weights) / total
