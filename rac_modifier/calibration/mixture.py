"""Take calibration sequences up to a budget of real tokens, and count their tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace

from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import CalibrationSettings, Part, part_tokens
from rac_modifier.traces.records import Trace


@dataclass(frozen=True)
class CalibrationSequence:
    """Token ids of a calibration sequence; the model generated all but the first `prompt_tokens`."""

    ids: tuple[int, ...]
    prompt_tokens: int
    kind: str
    finished: bool = True
    answer_start: int | None = None
    """The first token after the thinking; None without thinking, and if tokens weigh the same."""
    weight: float = 1.0
    """Factor for all tokens of the sequence."""

    def cut(self, length: int) -> CalibrationSequence:
        """Return the first `length` tokens."""
        return replace(
            self,
            ids=self.ids[:length],
            prompt_tokens=min(self.prompt_tokens, length),
            finished=False,
        )

    def weights(self, settings: CalibrationSettings) -> list[float]:
        """Return the weight of each token in the Hessian; generic text weighs as much as traces."""
        prompt, trace = settings.prompt_weight, 1.0
        if self.kind == "generic":
            return [trace] * len(self.ids)
        weights = [prompt] * self.prompt_tokens + [trace] * (len(self.ids) - self.prompt_tokens)
        if settings.answer_weight is not None and self.answer_start is not None:
            answer = len(weights[self.answer_start :])
            weights[self.answer_start :] = [settings.answer_weight] * answer
        return weights if self.weight == 1.0 else [self.weight * w for w in weights]


@dataclass(frozen=True)
class Composition:
    """The tokens and sequences of a calibration set by kind; padding does not count."""

    prompt_tokens: int
    trace_tokens: int
    generic_tokens: int
    sequences: int
    truncated_sequences: int
    unfinished_traces: int
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Tokens and sequences of each part of the mixture."""

    @property
    def tokens(self) -> int:
        """All real tokens."""
        return self.prompt_tokens + self.trace_tokens + self.generic_tokens

    @property
    def unfinished_share(self) -> float:
        """Share of the traces that hit the cap of sampling; 0 without traces."""
        traces = sum(
            part["sequences"]
            for key, part in self.parts.items()
            if Part.parse(key).kind == "traces"
        )
        return self.unfinished_traces / traces if traces else 0.0

    def as_dict(self) -> dict[str, int | dict[str, dict[str, int]]]:
        """Return the counts for the run record."""
        return {"tokens": self.tokens, **asdict(self)}

    def describe(self) -> str:
        """Describe the set in a sentence for the log."""
        by_part = ", ".join(f"{part['tokens']:,} {name}" for name, part in self.parts.items())
        parts = f" ({by_part})" if len(self.parts) > 1 else ""
        return (
            f"calibrating on {self.tokens:,} tokens in {self.sequences:,} sequences{parts}: "
            f"{self.trace_tokens:,} of chain of thought, {self.prompt_tokens:,} of prompts, "
            f"{self.generic_tokens:,} of generic text; {self.unfinished_traces:,} traces "
            f"({self.unfinished_share:.0%}) hit the sampling cap, {self.truncated_sequences:,} "
            "sequences were cut to fit"
        )


def trace_sequence(
    trace: Trace, answer_start: int | None = None, weight: float = 1.0
) -> CalibrationSequence:
    """Return prompt and completion as a sequence, the ids exactly as they were generated."""
    ids = (*trace.prompt_ids, *trace.completion_ids)
    return CalibrationSequence(
        ids, len(trace.prompt_ids), "traces", trace.finish_reason == "stop", answer_start, weight
    )


def prompt_sequence(ids: Iterable[int]) -> CalibrationSequence:
    """Return a prompt without a completion."""
    ids = tuple(ids)
    return CalibrationSequence(ids, len(ids), "prompts")


def generic_sequence(ids: Iterable[int]) -> CalibrationSequence:
    """Return a piece of generic text."""
    ids = tuple(ids)
    return CalibrationSequence(ids, len(ids), "generic")


def mix(
    parts: Mapping[str, Iterable[CalibrationSequence]], settings: CalibrationSettings
) -> tuple[list[CalibrationSequence], Composition]:
    """Fill each part's share of the budget, exactly to the token, and shuffle.

    Only as many sequences of a part are read as its budget needs; the last one is cut to fit.

    Raises:
        RacError: a part with a share has too few tokens; traces have a share, but no token is theirs.
    """
    chosen: list[CalibrationSequence] = []
    counts: dict[str, dict[str, int]] = {}
    truncated = unfinished = 0
    for key, budget in part_tokens(settings.mixture, settings.tokens).items():
        before, missing = len(chosen), budget
        for sequence in parts[key]:
            if missing <= 0:
                break
            unfinished += sequence.kind == "traces" and not sequence.finished
            longest = min(missing, settings.max_sequence_tokens or missing)
            if len(sequence.ids) > longest:
                sequence, truncated = sequence.cut(longest), truncated + 1
            chosen.append(sequence)
            missing -= len(sequence.ids)
        if missing > 0:
            raise RacError(
                f"the {key} part of the calibration set has {budget - missing:,} tokens but its "
                f"share asks for {budget:,}; "
                f"lower calibration.tokens, or give more {Part.parse(key).kind}"
            )
        counts[key] = {"tokens": budget, "sequences": len(chosen) - before}
    random.Random(f"{settings.seed}/order").shuffle(chosen)
    composition = replace(compose(chosen, truncated, unfinished), parts=counts)
    if not composition.trace_tokens and any(Part.parse(key).kind == "traces" for key in counts):
        raise RacError(
            "the calibration set is meant to hold chain-of-thought traces but has no token of any: "
            "the traces may be empty or cut away by max_sequence_tokens; look at the store with "
            "`rac traces inspect`"
        )
    return chosen, composition


def compose(
    sequences: list[CalibrationSequence], truncated: int = 0, unfinished: int = 0
) -> Composition:
    """Count the tokens and sequences of each kind."""
    generic = sum(len(s.ids) for s in sequences if s.kind == "generic")
    prompt = sum(s.prompt_tokens for s in sequences if s.kind != "generic")
    return Composition(
        prompt_tokens=prompt,
        trace_tokens=sum(len(s.ids) for s in sequences) - generic - prompt,
        generic_tokens=generic,
        sequences=len(sequences),
        truncated_sequences=truncated,
        unfinished_traces=unfinished,
    )
