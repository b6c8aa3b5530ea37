"""What a user sets about traces: where they come from, and which of them are calibrated on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.check import Count, Settings, Share
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings


class SelectSettings(Settings):
    """Which traces are calibrated on. What is sampled and stored does not change.

    A selection that keeps one in three costs three times the sampling.
    """

    answers: Literal["any", "correct", "wrong"] = "any"
    """correct: keep traces with the right final answer; wrong: keep those whose answer is wrong or
    missing; both need reference answers."""

    finished: bool = False
    """Keep only traces that end with an end-of-sequence token, and none that was cut."""

    min_tokens: Count | None = None
    """Keep traces with at least this many completion tokens."""

    max_tokens: Count | None = None
    """Keep traces with at most this many completion tokens."""

    pass_rate: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None
    """Keep problems whose share of right samples lies within these bounds, e.g. [0.2, 0.8]; needs
    reference answers and samples_per_problem of at least 2."""

    @model_validator(mode="after")
    def _can_be_met(self) -> SelectSettings:
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise RacError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        if self.pass_rate is not None and self.pass_rate[0] > self.pass_rate[1]:
            raise RacError(f"pass_rate {self.pass_rate}: give the lowest share first")
        return self

    @property
    def checks_answers(self) -> bool:
        """Return whether every answer has to be checked."""
        return self.answers != "any" or self.pass_rate is not None


class TraceSource(Settings):
    """A named source of traces, with a store of its own under rac_traces/."""

    problems: ProblemSource
    """The problems that the model is asked."""

    select: SelectSettings | None = None
    """Which of its traces are calibrated on; default: as in traces."""


class TraceSettings(Settings):
    """Where the traces come from: problems, sampling, and the store that keeps them."""

    store: str | None = None
    """Trace store (a .jsonl file), read and filled up; default: a file under rac_traces/ named
    after the model, the problems and the sampling settings."""

    problems: ProblemSource = ProblemSource()
    """The problems that the model is asked."""

    sampling: SamplingSettings = SamplingSettings()
    """How the model is sampled."""

    select: SelectSettings = SelectSettings()
    """Which traces are calibrated on; default: all of them. Tails that repeat are cut."""

    engine: EngineSettings | None = None
    """OpenAI-compatible servers that sample; default: the model samples in this process."""

    allow_off_policy: bool = False
    """Calibrate on traces of another model; its store is then only read, nothing is added."""

    sources: dict[str, TraceSource] = Field({})
    """Further sources by name, for use in a mixture: traces:math, prompts:math."""

    @model_validator(mode="after")
    def _can_be_selected(self) -> TraceSettings:
        longest, samples = self.sampling.max_new_tokens, self.sampling.samples_per_problem
        for name in (None, *self.sources):
            select = self.named(name).select
            if (select.min_tokens or 0) > longest:
                raise RacError(
                    f"select.min_tokens={select.min_tokens} can never be met with "
                    f"sampling.max_new_tokens={longest}"
                )
            if select.pass_rate is not None and samples < 2:
                raise RacError("select.pass_rate: set sampling.samples_per_problem to 2 or more")
        return self

    def named(self, name: str | None) -> TraceSettings:
        """Return the settings of a declared source or of a name that is one (RacError: neither)."""
        if name is None:
            return self
        if (source := self.sources.get(name)) is None:
            if not ProblemSource.looks_like(name):
                declared = ", ".join(self.sources) or "none"
                raise RacError(
                    f"mixture names traces:{name}, which is not among traces.sources ({declared}) "
                    "and no source itself (arithmetic, reasoning-gym:<task>, a file, a dataset id)"
                )
            source = TraceSource(problems=ProblemSource(source=name))
        update: dict[str, Any] = {"store": None, "sources": {}, "problems": source.problems}
        return self.model_copy(update={**update, "select": source.select or self.select})
