"""What a user sets about traces: where they come from, and which of them are calibrated on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.base import Settings
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings


class SelectSettings(Settings):
    """Which traces are calibrated on. What is sampled and stored does not change.

    A trace that is not selected has been sampled all the same: a selection that keeps one in three costs three times
    the sampling. Beside that only `answers` and `pass_rate` cost time: every answer is checked, in microseconds for
    integers and milliseconds for mathematics.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    answers: Literal["any", "correct", "wrong"] = Field(
        "any",
        description="correct: keep traces with the right final answer; wrong: keep those whose answer is wrong or missing; "
        "both need reference answers",
    )
    finished: bool = Field(
        False,
        description="keep only traces that end with an end-of-sequence token, and none that was cut",
    )
    min_tokens: int | None = Field(
        None, ge=1, description="keep traces with at least this many completion tokens"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="keep traces with at most this many completion tokens"
    )
    dedupe: bool = Field(False, description="of completions with the same token ids keep the first")
    repeated_tails: Literal["cut", "keep"] = Field(
        "cut",
        description="cut: a completion that was cut at the cap while it repeated itself ends before the second copy, for "
        "calibration, recovery and what is held out; keep: it is used whole",
    )
    per_problem: int | None = Field(
        None, ge=1, description="keep at most this many traces per problem, the first ones"
    )
    pass_rate: tuple[float, float] | None = Field(
        None,
        description="keep problems whose share of right samples lies within these bounds, e.g. [0.2, 0.8] for neither easy "
        "nor hopeless ones; needs reference answers and samples_per_problem of at least 2",
    )
    least_share: float = Field(
        0.02,
        gt=0,
        le=1,
        description="stop with an error where the selection keeps a smaller share of the sampled tokens than this, since "
        "the budget would take too long",
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

    @property
    def keeps_all(self) -> bool:
        """Whether every trace is kept."""
        limits = (self.min_tokens, self.max_tokens, self.per_problem)
        return not (self.checks_answers or self.finished or self.dedupe or any(limits))

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


class TraceSource(Settings):
    """A named source of traces. What it does not set is as in `traces`; only the store is always its own."""

    problems: ProblemSource = Field(description="the problems that the model is asked")
    store: str | None = Field(
        None, description="its own trace store; default: a file under rac_traces/"
    )
    sampling: SamplingSettings | None = Field(
        None, description="how the model is sampled; default: as in traces"
    )
    select: SelectSettings | None = Field(
        None, description="which of its traces are calibrated on; default: as in traces"
    )
    allow_off_policy: bool | None = Field(
        None, description="calibrate on traces of another model; default: as in traces"
    )


class TraceSettings(Settings):
    """Where the chain-of-thought traces come from: problems, sampling, and the store that keeps them."""

    store: str | None = Field(
        None,
        description="trace store (a .jsonl file): it is read, and filled up where it holds too few tokens; "
        "default: a file under rac_traces/ named after the model, the problems and the sampling settings",
    )
    problems: ProblemSource = Field(
        ProblemSource(), description="the problems that the model is asked"
    )
    sampling: SamplingSettings = Field(SamplingSettings(), description="how the model is sampled")
    select: SelectSettings = Field(
        SelectSettings(),
        description="which traces are calibrated on; default: all of them, as in the paper, but without tails that repeat",
    )
    engine: EngineSettings | None = Field(
        None,
        description="OpenAI-compatible servers that sample; default: the model samples in this process",
    )
    retry_failed: bool = Field(
        False,
        description="try again the problems that a server could not complete (listed in the store's .failed.jsonl)",
    )
    allow_off_policy: bool = Field(
        False,
        description="calibrate on traces of another model; its store is then only read, nothing is added to it",
    )
    sources: dict[str, TraceSource] = Field(
        {}, description="further sources by name, for use in a mixture: traces:math, prompts:math"
    )

    @model_validator(mode="after")
    def _can_be_selected(self) -> TraceSettings:
        for name in (None, *self.sources):
            one = self if name is None else self.named(name)
            one.select.check_against(one.sampling.max_new_tokens, one.sampling.samples_per_problem)
        return self

    def named(self, name: str | None) -> TraceSettings:
        """The settings of a part of the mixture: these, those of a declared source, or these for other problems.

        Raises:
            RacError: a name that is neither declared nor a source of problems itself.
        """
        if name is None:
            return self
        plain: dict[str, Any] = {"store": None, "sources": {}}
        if (source := self.sources.get(name)) is not None:
            own = {
                key: value
                for key in TraceSource.model_fields
                if (value := getattr(source, key)) is not None
            }
            return self.model_copy(update={**plain, **own})
        if not ProblemSource.looks_like(name):
            declared = ", ".join(self.sources) or "none"
            raise RacError(
                f"mixture names traces:{name}, which is not among traces.sources ({declared}) and is no problem source by "
                "itself (arithmetic, reasoning-gym:<task>, a file or a dataset id)"
            )
        return self.model_copy(update={**plain, "problems": ProblemSource(source=name)})
