"""The first traces of a store, kept out of calibration: what a pruned model is compared with the dense one on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rac_modifier.traces.store import Trace

TRACES = 4  # at least, so that one odd trace does not decide


class HoldOut:
    """Keeps out the first `TRACES` problems or more, up to `tokens` tokens, with all samples of their problems; the others pass.

    The first in order, so that a store that grows holds out the same; `tokens` 0 holds out nothing. Only what is held out is
    in memory.
    """

    def __init__(self, tokens: int):
        self.held: list[Trace] = []
        self._tokens = tokens

    def others(self, traces: Iterable[Trace]) -> Iterator[Trace]:
        """The traces that are not held out."""
        problems: set[str] = set()
        count = 0
        for trace in traces:
            enough = count >= self._tokens and (len(problems) >= TRACES or not self._tokens)
            if enough and trace.problem_id not in problems:
                yield trace
                continue
            problems.add(trace.problem_id)
            self.held.append(trace)
            count += trace.tokens
