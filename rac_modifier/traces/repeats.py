"""Completions that were cut while they repeated themselves: where the repetition begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rac_modifier.traces.records import Trace

LONGEST = 128  # tokens of a stretch that is looked for
COPIES, TAIL = 3, 64  # a tail repeats if it is at least so many copies, and so many tokens


def repeated_tokens(ids: Sequence[int]) -> int:
    """How many tokens at the end are further copies of the stretch before them; 0 where the end does not repeat.

    The end repeats if it is at least `COPIES` copies, the last one perhaps not whole, of a stretch of at most `LONGEST` tokens,
    and at least `TAIL` tokens long together.
    """
    for period in range(1, min(LONGEST, len(ids) // COPIES) + 1):
        same = 0
        while period + same < len(ids) and ids[-1 - same] == ids[-1 - same - period]:
            same += 1
        if same >= (COPIES - 1) * period and same + period >= TAIL:
            return same
    return 0


def repeated_tail(ids: Sequence[int], finish_reason: str) -> int:
    """`repeated_tokens` of a completion that was cut at the cap; 0 for one that ended by itself."""
    return repeated_tokens(ids) if finish_reason == "length" else 0


def without_repeats(trace: Trace) -> Trace:
    """The trace up to the end of the first copy, if it was cut at the cap while it repeated itself; else as it is."""
    tail = repeated_tail(trace.completion_ids, trace.finish_reason)
    return replace(trace, completion_ids=trace.completion_ids[:-tail]) if tail else trace
