"""Which traces of a store are calibrated on. By default all of them, as in the paper, but without tails that repeat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.records import Trace
from rac_modifier.traces.repeats import without_repeats

Judged = tuple[Trace, bool | None]
Judging = Callable[[Iterable[Trace]], Iterator[tuple[Trace, bool]]]


class Selection:
    """Filters traces by settings; counts how many were kept, and how many were dropped for which reason.

    The traces of a problem must follow each other, as they do in a store. In memory are the samples of one problem, and with
    `dedupe` one hash per trace.
    """

    def __init__(self, settings: SelectSettings):
        self.settings = settings
        self.total = 0
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        self._seen: set[int] = set()

    def keep(self, judged: Iterable[Judged]) -> Iterator[Trace]:
        """The traces to calibrate on, in order; `judged` has with each trace whether it is right (None: not checked)."""
        for _, samples in groupby(judged, key=lambda one: one[0].problem_id):
            kept_here = 0
            for trace, reason in self._reasons(samples):
                self.total += 1
                if (
                    reason is None
                    and self.settings.per_problem is not None
                    and kept_here >= self.settings.per_problem
                ):
                    reason = "beyond per_problem"
                if reason is not None:
                    self.dropped[reason] += 1
                    continue
                self.kept += 1
                kept_here += 1
                yield trace

    def _reasons(self, samples: Iterable[Judged]) -> Iterator[tuple[Trace, str | None]]:
        """Each sample of a problem with the first reason against it."""
        if (bounds := self.settings.pass_rate) is not None:
            samples = list(samples)
            rate = sum(bool(right) for _, right in samples) / len(samples)
            if not bounds[0] <= rate <= bounds[1]:
                yield from (
                    (trace, "too easy" if rate > bounds[1] else "too hard") for trace, _ in samples
                )
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
        if settings.dedupe:
            identity = hash(trace.completion_ids)
            if identity in self._seen:
                return "duplicates"
            self._seen.add(identity)
        return None

    def describe(self) -> str:
        """For example "kept 812 of 1,024: 150 wrong, 62 unfinished"."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.most_common())
        return f"kept {self.kept:,} of {self.total:,}" + (f": {reasons}" if reasons else "")

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """For the run record."""
        return {"kept": self.kept, "of": self.total, "dropped": dict(self.dropped.most_common())}


def select(traces: Iterable[Trace], selection: Selection, judge: Judging) -> Iterator[Trace]:
    """The traces that `selection` keeps; answers are judged only if its settings need that."""
    if selection.settings.checks_answers:
        return selection.keep(judge(traces))
    return selection.keep((trace, None) for trace in traces)


def as_used(traces: Iterable[Trace], settings: SelectSettings) -> Iterable[Trace]:
    """The traces with repeated tails cut, where the settings say so; to be done before they are selected or held out."""
    return map(without_repeats, traces) if settings.repeated_tails == "cut" else traces
