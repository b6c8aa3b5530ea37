"""Which traces of a store are calibrated on. By default all of them, as in the paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rac_modifier.errors import RacError
from rac_modifier.traces.records import Trace

Judged = tuple[Trace, bool | None]
Judging = Callable[[Iterable[Trace]], Iterator[tuple[Trace, bool]]]


class SelectSettings(BaseModel):
    """What a trace must be like to be calibrated on; what is sampled and stored does not change.

    Each trace passed over has been sampled all the same, so a selection that keeps one in three costs three times the
    sampling. Beyond that only `answers` and `pass_rate` cost anything: every answer is checked, which takes microseconds for
    integers and milliseconds for mathematics.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    answers: Literal["any", "correct", "wrong"] = Field(
        "any",
        description="keep traces whose final answer is right, or those whose answer is wrong or missing; needs reference answers",
    )
    finished: bool = Field(
        False, description="keep only traces that ended by themselves (EOS), not those cut at the cap"
    )
    min_tokens: int | None = Field(None, ge=1, description="completion tokens of a trace at least")
    max_tokens: int | None = Field(
        None, ge=1, description="completion tokens of a trace at most; longer ones are passed over"
    )
    dedupe: bool = Field(False, description="keep one of several completions with the same token ids")
    per_problem: int | None = Field(
        None, ge=1, description="keep at most this many traces of a problem, the first ones"
    )
    pass_rate: tuple[float, float] | None = Field(
        None,
        description="keep problems whose share of right samples lies within these bounds, e.g. [0.2, 0.8]: neither easy "
        "nor hopeless; needs reference answers and samples_per_problem of at least 2",
    )
    least_share: float = Field(
        0.02,
        gt=0,
        le=1,
        description="end with an error when so small a share of the sampled tokens is kept that the budget would take too long",
    )

    @model_validator(mode="after")
    def _can_be_met(self) -> SelectSettings:
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise RacError(
                f"min_tokens={self.min_tokens} and max_tokens={self.max_tokens} leave no length between them"
            )
        if self.pass_rate is not None and not 0 <= self.pass_rate[0] <= self.pass_rate[1] <= 1:
            raise RacError(
                f"pass_rate {list(self.pass_rate)}: give the lowest and the highest share, such as [0.2, 0.8]"
            )
        return self

    @property
    def checks_answers(self) -> bool:
        """Whether every answer has to be checked."""
        return self.answers != "any" or self.pass_rate is not None

    def check_against(self, max_new_tokens: int, samples_per_problem: int) -> None:
        """Refuse what no trace sampled so can meet.

        Raises:
            RacError: naming both settings.
        """
        if self.min_tokens is not None and self.min_tokens > max_new_tokens:
            raise RacError(
                f"select.min_tokens={self.min_tokens} can never be met with sampling.max_new_tokens={max_new_tokens}"
            )
        if self.pass_rate is not None and samples_per_problem < 2:
            raise RacError(
                "select.pass_rate needs several samples of each problem; set sampling.samples_per_problem to 2 or more"
            )


class Selection:
    """Passes on the traces that settings keep, and counts what was kept and why the rest was not.

    Traces must come problem by problem, as they are stored. Memory: the samples of one problem, and with `dedupe` a hash a trace.
    """

    def __init__(self, settings: SelectSettings):
        self.settings = settings
        self.total = 0
        self.kept = 0
        self.dropped: Counter[str] = Counter()
        self._seen: set[int] = set()

    def keep(self, judged: Iterable[Judged]) -> Iterator[Trace]:
        """The traces to calibrate on, in order; `judged` tells with each whether it is right (None: not asked)."""
        for _, samples in groupby(judged, key=lambda one: one[0].problem_id):
            kept_here = 0
            for trace, reason in self._reasons(samples):
                self.total += 1
                if reason is None and self.settings.per_problem is not None and kept_here >= self.settings.per_problem:
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
                yield from ((trace, "too easy" if rate > bounds[1] else "too hard") for trace, _ in samples)
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
    """What `selection` keeps of `traces`; answers are judged only if its settings ask for it."""
    if selection.settings.checks_answers:
        return selection.keep(judge(traces))
    return selection.keep((trace, None) for trace in traces)
