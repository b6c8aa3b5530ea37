"""The first traces of a store, kept out of calibration: what a pruned model is compared with the dense one on."""

from __future__ import annotations

from collections.abc import Iterable

from rac_modifier.traces.store import Trace

TRACES = 4  # at least, so that one odd trace does not decide


def split(traces: Iterable[Trace], tokens: int) -> tuple[list[Trace], list[Trace]]:
    """Held-out and other traces: the first `TRACES` or more, up to `tokens` tokens, with all samples of their problems.

    The first in order, so that a store that grows holds out the same; `tokens` 0 holds out nothing.
    """
    held: list[Trace] = []
    others: list[Trace] = []
    problems: set[str] = set()
    count = 0
    for trace in traces:
        if trace.problem_id not in problems and (count >= tokens and (len(problems) >= TRACES or not tokens)):
            others.append(trace)
            continue
        problems.add(trace.problem_id)
        held.append(trace)
        count += trace.tokens
    return held, others
