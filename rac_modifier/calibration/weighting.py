"""What each trace weighs as a whole, beside the weights of its kinds of tokens."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

from rac_modifier.errors import RacError
from rac_modifier.traces.records import Trace

Weighting = Callable[[Trace], float]
NAMED = ("uniform", "inverse_length", "correct")


def check_weighting(name: str) -> None:
    """Refuse early what cannot be a weighting; a function is only imported when it is used.

    Raises:
        RacError: neither one of the named ones nor module:function.
    """
    module, colon, function = name.partition(":")
    if name not in NAMED and not (
        colon and function.isidentifier() and all(p.isidentifier() for p in module.split("."))
    ):
        raise RacError(f'trace_weighting is {name!r}; use {", ".join(NAMED)}, or "module:function" for one of your own')


def find_weighting(name: str, is_right: Callable[[Trace], bool]) -> Weighting | None:
    """The weighting of that name; None where every trace weighs 1.

    Args:
        name: one of `NAMED`, or "module:function": a function of a `Trace` that returns its weight, at least 0.
        is_right: whether a trace's answer is right; asked by "correct" only.

    Raises:
        RacError: there is no such function.
    """
    if name == "uniform":
        return None
    if name == "inverse_length":
        return lambda trace: 1 / trace.tokens
    if name == "correct":
        return lambda trace: float(is_right(trace))
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RacError(
            f"trace_weighting {name!r} cannot be imported ({error}); put the module on PYTHONPATH"
        ) from error
    return lambda trace: _checked(found(trace), name, trace)


def _checked(weight: object, name: str, trace: Trace) -> float:
    if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
        raise RacError(
            f"trace_weighting {name!r} gives trace {trace.id!r} the weight {weight!r}; return a number of at least 0"
        )
    return float(weight)


def scaled(weights: list[tuple[float, int]]) -> float:
    """The factor that gives (weight, tokens) pairs a mean of 1 a token, so that traces keep their share beside other parts.

    Raises:
        RacError: all of them are 0.
    """
    total = sum(weight * tokens for weight, tokens in weights)
    if total == 0:
        raise RacError("every trace of the calibration set weighs 0, so none would count; set another trace_weighting")
    return sum(tokens for _, tokens in weights) / total
