"""What a user sets about traces: where they come from, and which of them are calibrated on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings


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


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TraceSource(_Model):
    """A named source of traces; what it does not set is as in `traces`, except for the store, which is always its own."""

    problems: ProblemSource = Field(description="the problems to think about")
    store: str | None = Field(None, description="its own trace store; default: a file under rac_traces/")
    sampling: SamplingSettings | None = Field(None, description="how the model is sampled")
    select: SelectSettings | None = Field(None, description="which of its traces are calibrated on")
    allow_off_policy: bool | None = Field(None, description="calibrate on traces of another model")


class TraceSettings(_Model):
    """Where the chain-of-thought traces come from: problems, sampling, and the store that keeps them."""

    store: str | None = Field(
        None,
        description="trace store (a .jsonl file) to read, and to append to when it holds too few tokens; "
        "default: a file under rac_traces/ named after the model, the problems and the sampling settings",
    )
    problems: ProblemSource = Field(ProblemSource(), description="the problems to think about")
    sampling: SamplingSettings = Field(SamplingSettings(), description="how the model is sampled")
    select: SelectSettings = Field(
        SelectSettings(), description="which traces are calibrated on; default: all of them, as in the paper"
    )
    engine: EngineSettings | None = Field(
        None, description="OpenAI-compatible servers that sample; default: the model samples in this process"
    )
    retry_failed: bool = Field(
        False, description="try problems again that a server could not complete (the store's .failed.jsonl)"
    )
    allow_off_policy: bool = Field(
        False, description="calibrate on traces of another model; the store is then only read, never appended to"
    )
    sources: dict[str, TraceSource] = Field(
        {}, description="further sources, for a mixture to name: traces:math, prompts:math"
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
            own = {key: value for key in TraceSource.model_fields if (value := getattr(source, key)) is not None}
            return self.model_copy(update={**plain, **own})
        if not ProblemSource.looks_like(name):
            declared = ", ".join(self.sources) or "none"
            raise RacError(
                f"mixture names traces:{name}, which is not among traces.sources ({declared}) and no problem source by itself "
                "(arithmetic, reasoning-gym:<task>, a file or a dataset id)"
            )
        return self.model_copy(update={**plain, "problems": ProblemSource(source=name)})
