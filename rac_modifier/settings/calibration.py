"""What a user sets about calibration: its traces, the budget, and the mixture that fills it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator

from rac_modifier.errors import RacError
from rac_modifier.settings.check import Count, Seed, Settings, check_settings
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings

Kind = Literal["traces", "prompts", "generic"]
KINDS: tuple[Kind, ...] = ("traces", "prompts", "generic")
_EXAMPLE = "write it like {traces:math: 0.7, traces:code: 0.2, generic: 0.1}"
_Sequence = Annotated[int, Field(ge=16, le=10**9)]


@dataclass(frozen=True)
class Part:
    """One part of the calibration set; without a name it is `traces` or `calibration.generic`."""

    kind: Kind
    name: str | None = None

    @classmethod
    def parse(cls, key: str) -> Self:
        """Read "traces", "traces:math", "prompts", "prompts:math" or "generic" (RacError)."""
        kind, colon, name = key.partition(":")
        if kind not in KINDS or (colon and (not name or kind == "generic")):
            kinds = f"{', '.join(KINDS)}; the first two may have the name of a source"
            raise RacError(f"mixture names {key!r}; the kinds are {kinds}; {_EXAMPLE}")
        return cls(kind, name or None)

    @property
    def key(self) -> str:
        """Return the part as it is written in a mixture."""
        return self.kind if self.name is None else f"{self.kind}:{self.name}"


def part_tokens(mixture: Mapping[str, float], tokens: int) -> dict[str, int]:
    """Return the budget of each part, rounded so that all of them sum to `tokens`."""
    budgets = {key: round(tokens * share) for key, share in mixture.items()}
    *_, last = mixture
    budgets[last] += tokens - sum(budgets.values())
    return budgets


class GenericText(Settings):
    """Text that is not related to the problems, as usual calibration sets have it."""

    source: str = "python-docs"
    """python-docs (documentation that is part of Python), a .txt, .jsonl or .parquet file, or a
    Hugging Face dataset."""

    column: str | None = None
    """The column with the text; not for python-docs or .txt."""

    split: str = "train"
    """Split of a Hugging Face dataset."""

    config: str | None = None
    """Configuration of a Hugging Face dataset."""

    sequence_tokens: _Sequence = 512
    """Tokens per sequence into which the text is cut."""


class CalibrationSettings(Settings):
    """What is calibrated on, how it is batched, and what each token weighs."""

    tokens: Count = 262_144
    """Budget of real tokens (padding never counts). The run says whether more could help."""

    mixture: dict[str, float] = {"traces": 1.0}
    """Share of the budget per part: traces (prompts with their chains of thought) and prompts, with
    or without the name of a source, and generic: {traces:math: 0.7, traces:code: 0.2, generic:
    0.1}."""

    max_sequence_tokens: _Sequence | None = None
    """Longer sequences are cut to this many tokens, and counted as truncated; default: none is."""

    held_out_tokens: int = Field(2048, ge=0, le=10**9)
    """Traces of about this many tokens, of four problems at least, are not calibrated on: the
    record has the pruned model's divergence on them; 0: not measured."""

    generic: GenericText = GenericText()
    """The text of the part generic."""

    seed: Seed = 0
    """Decides which sequences of each part are taken, and the order of the batches."""

    batch_tokens: _Sequence = 16_384
    """Sequences times length of a padded batch at most."""

    @field_validator("mixture", mode="before")
    @classmethod
    def _is_a_mapping(cls, mixture: Any) -> Any:
        if not isinstance(mixture, Mapping):
            raise RacError(f"mixture {mixture!r} is no valid dictionary; {_EXAMPLE}")
        return mixture

    @field_validator("mixture")
    @classmethod
    def _known_shares(cls, mixture: dict[str, float]) -> dict[str, float]:
        for key, share in mixture.items():
            if not 0 <= share <= 1:
                raise RacError(f"mixture gives {key} the share {share}; use a number from 0 to 1")
        total = sum(mixture.values())
        if abs(total - 1) > 1e-6:
            raise RacError(f"shares of mixture {mixture} sum to {total:g}; make them sum to 1")
        by_kind = sorted(mixture, key=lambda key: KINDS.index(Part.parse(key).kind))
        return {key: mixture[key] for key in by_kind if mixture[key] > 0}

    def parts(self, *kinds: Kind) -> list[Part]:
        """Return the parts of these kinds that have a share."""
        return [part for part in map(Part.parse, self.mixture) if part.kind in kinds]

    def share(self, kind: Kind) -> float:
        """Return the share of the budget over all parts of one kind."""
        return sum(self.mixture[part.key] for part in self.parts(kind))


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
