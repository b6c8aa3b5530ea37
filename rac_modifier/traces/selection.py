"""Choose traces of a store. By default all are used, as in the paper, but without tails that repeat."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, islice

from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.records import Trace
from rac_modifier.traces.store import TraceStore

Judged = tuple[Trace, bool | None]
Judging = Callable[[Iterable[Trace]], Iterator[tuple[Trace, bool]]]

LONGEST_PERIOD = 128  # tokens of a repeated stretch
COPIES, TAIL = 3, 64  # copies and tokens that a repeating tail has at least


def loop_at_end(items: Sequence[int] | Sequence[str]) -> tuple[int, int] | None:
    """Return the index where the repeating end begins, and its period; None if no end repeats.

    The end repeats if it is at least `COPIES` copies, the last of them perhaps cut, of a stretch of at
    most `LONGEST_PERIOD` items, and at least `TAIL` items long.
    """
    for period in range(1, min(LONGEST_PERIOD, len(items) // COPIES) + 1):
        same = 0
        while period + same < len(items) and items[-1 - same] == items[-1 - same - period]:
            same += 1
        if same >= (COPIES - 1) * period and same + period >= TAIL:
            return len(items) - same - period, period
    return None


def repeated_tokens(ids: Sequence[int]) -> int:
    """Count the tokens at the end that are further copies of the stretch before them."""
    loop = loop_at_end(ids)
    return 0 if loop is None else len(ids) - sum(loop)


def repeated_tail(ids: Sequence[int], finish_reason: str) -> int:
    """Return `repeated_tokens` of a completion that was cut at the cap; 0 if it ended by itself."""
    return repeated_tokens(ids) if finish_reason == "length" else 0


def without_repeats(trace: Trace) -> Trace:
    """Cut a repeating tail down to its first copy; a trace that ended by itself stays as it is."""
    tail = repeated_tail(trace.completion_ids, trace.finish_reason)
    return replace(trace, completion_ids=trace.completion_ids[:-tail]) if tail else trace


class Selection:
    """Filters traces by settings; counts the traces that pass, and those that do not by reason.

    The traces of a problem must be neighbours, as they are in a store. In memory are the samples of
    one problem.
    """

    def __init__(self, settings: SelectSettings):
        self.settings = settings
        self.total = 0
        self.kept = 0
        self.dropped: Counter[str] = Counter()

    def keep(self, judged: Iterable[Judged]) -> Iterator[Trace]:
        """Yield the selected traces in order; each trace comes with its verdict (None: unchecked)."""
        for _, samples in groupby(judged, key=lambda pair: pair[0].problem_id):
            for trace, reason in self._reasons(samples):
                self.total += 1
                if reason is not None:
                    self.dropped[reason] += 1
                    continue
                self.kept += 1
                yield trace

    def _reasons(self, samples: Iterable[Judged]) -> Iterator[tuple[Trace, str | None]]:
        """Yield each sample of a problem with the first reason against it."""
        if (bounds := self.settings.pass_rate) is not None:
            samples = list(samples)
            rate = sum(bool(right) for _, right in samples) / len(samples)
            if not bounds[0] <= rate <= bounds[1]:
                reason = "too easy" if rate > bounds[1] else "too hard"
                yield from ((trace, reason) for trace, _ in samples)
                return
        for trace, right in samples:
            yield trace, self._reason(trace, right)

    def _reason(self, trace: Trace, right: bool | None) -> str | None:
        settings, length = self.settings, len(trace.completion_ids)
        if settings.finished and trace.finish_reason != "stop":
            return "unfinished"
        if settings.min_tokens is not None and length < settings.min_tokens:
            return "too short"
        if settings.max_tokens is not None and length > settings.max_tokens:
            return "too long"
        if settings.answers == "correct" and not right:
            return "wrong"
        if settings.answers == "wrong" and right:
            return "right"
        return None

    def describe(self) -> str:
        """Describe the counts, for example "kept 812 of 1,024: 150 wrong, 62 unfinished"."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        return f"kept {self.kept:,} of {self.total:,}" + (f": {reasons}" if reasons else "")

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """Return the counts for the run record."""
        return {"kept": self.kept, "of": self.total, "dropped": dict(self.dropped.most_common())}


def select(traces: Iterable[Trace], selection: Selection, judge: Judging) -> Iterator[Trace]:
    """Yield the traces that `selection` keeps; answers are judged only if its settings need that."""
    if selection.settings.checks_answers:
        return selection.keep(judge(traces))
    return selection.keep((trace, None) for trace in traces)


def used_traces(store: TraceStore, hashes: Collection[str]) -> int:
    """Count the first traces of a store that earlier runs used.

    A store only grows. So what a run used is the part of the file that has the SHA-256 of the run's
    record, whatever was appended since.

    Args:
        store: opened.
        hashes: `TraceStore.sha256` of stores, from run records; of another store they match nothing.
    """
    digest, used = hashlib.sha256(), 0
    with store.path.open("rb") as file:
        digest.update(file.readline())  # the header
        for number in range(1, len(store) + 1):
            digest.update(file.readline())
            if digest.hexdigest() in hashes:
                used = number
    return used


def fresh_traces(store: TraceStore, used: int, tokens: int) -> list[Trace]:
    """Return the traces after the first `used`, up to the trace that reaches `tokens` tokens.

    Tails that repeat are cut.
    """
    chosen: list[Trace] = []
    for trace in map(without_repeats, islice(store, used, None)):
        if tokens <= 0:
            break
        chosen.append(trace)
        tokens -= trace.tokens
    return chosen
