"""What a user sets about traces: where they come from, and which of them are calibrated on."""

from typing import Any, Literal, Self

from pydantic import Field

from rac_modifier.errors import RacError
from rac_modifier.settings.check import Count, Settings, check_settings
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings


class SelectSettings(Settings):
    """Which traces are calibrated on. What is sampled and stored does not change.

    A selection that keeps one in three costs three times the sampling.
    """

    answers: Literal["any", "correct"] = "any"
    """correct: keep traces with the right final answer, which needs reference answers."""

    finished: bool = False
    """Keep only traces that end with an end-of-sequence token, and none that was cut."""

    max_tokens: Count | None = None
    """Keep traces with at most this many completion tokens."""


class TraceSource(Settings):
    """A named source of traces, with a store of its own under rac_traces/."""

    problems: ProblemSource
    """The problems that the model is asked."""

    select: SelectSettings | None = None
    """Which of its traces are calibrated on; default: as in traces."""

    thinking: bool | None = None
    """The enable_thinking of the chat template; default: as in traces.sampling."""

    system_prompt: str | None = None
    """System message before each question; default: as in traces.sampling."""


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

    def named(self, name: str | None) -> Self:
        """Return the settings of a declared source or of a name that is one (RacError: neither)."""
        if name is None:
            return self
        if (source := self.sources.get(name)) is None:
            problems = ProblemSource(source=name)
            if not (problems.is_generator or problems.is_file or "/" in name):
                declared = ", ".join(self.sources) or "none"
                raise RacError(
                    f"mixture names traces:{name}, which is not among traces.sources ({declared}) "
                    "and no source itself (arithmetic, reasoning-gym:<task>, a file, a dataset id)"
                )
            source = TraceSource(problems=problems)
        prompt = source.model_dump(include={"thinking", "system_prompt"}, exclude_none=True)
        update: dict[str, Any] = {"store": None, "sources": {}, "problems": source.problems}
        written = {**self.sampling.model_dump(exclude_unset=True), **prompt}
        update["sampling"] = check_settings(SamplingSettings, written, f"traces.sources.{name}")
        return self.model_copy(update={**update, "select": source.select or self.select})
