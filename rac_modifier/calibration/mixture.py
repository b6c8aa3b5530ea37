"""Take calibration sequences up to a budget of real tokens, and count their tokens."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.problems.tables import stream_rows
from rac_modifier.settings.calibration import CalibrationSettings, GenericText, Part, part_tokens

_BUFFER = 10_000  # documents


@dataclass(frozen=True)
class CalibrationSequence:
    """Token ids of a calibration sequence; the first `prompt_tokens` are the prompt."""

    ids: tuple[int, ...]
    prompt_tokens: int
    kind: str
    finished: bool = True

    def cut(self, length: int) -> CalibrationSequence:
        """Return the first `length` tokens."""
        prompt = min(self.prompt_tokens, length)
        return replace(self, ids=self.ids[:length], prompt_tokens=prompt, finished=False)

    def weights(self, prompt_weight: float) -> list[float]:
        """Return the weight of each token in the Hessian; generic text weighs 1 like traces."""
        prompt = 0 if self.kind == "generic" else self.prompt_tokens
        return [prompt_weight] * prompt + [1.0] * (len(self.ids) - prompt)


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
        """Return the number of real tokens."""
        return self.prompt_tokens + self.trace_tokens + self.generic_tokens

    @property
    def unfinished_share(self) -> float:
        """Return the share of the traces that hit the cap of sampling; 0 without traces."""
        traces = sum(
            counts["sequences"]
            for key, counts in self.parts.items()
            if Part.parse(key).kind == "traces"
        )
        return self.unfinished_traces / traces if traces else 0.0

    def as_dict(self) -> dict[str, int | dict[str, dict[str, int]]]:
        """Return the counts for the run record."""
        return {"tokens": self.tokens, **asdict(self)}

    def describe(self) -> str:
        """Describe the set in a sentence for the log."""
        by_part = ", ".join(f"{counts['tokens']:,} {name}" for name, counts in self.parts.items())
        mixed = f" ({by_part})" if len(self.parts) > 1 else ""
        return (
            f"calibrating on {self.tokens:,} tokens in {self.sequences:,} sequences{mixed}: "
            f"{self.trace_tokens:,} of chain of thought, {self.prompt_tokens:,} of prompts, "
            f"{self.generic_tokens:,} of generic text; {self.unfinished_traces:,} traces "
            f"({self.unfinished_share:.0%}) hit the sampling cap, {self.truncated_sequences:,} "
            "sequences were cut to fit"
        )


def mix(
    by_part: Mapping[str, Iterable[CalibrationSequence]], settings: CalibrationSettings
) -> tuple[list[CalibrationSequence], Composition]:
    """Fill each part's share of the budget, exactly to the token, and shuffle.

    Only as many sequences of a part are read as its budget needs; the last one is cut to fit.
    """
    sequences: list[CalibrationSequence] = []
    counts: dict[str, dict[str, int]] = {}
    truncated = unfinished = 0
    for key, budget in part_tokens(settings.mixture, settings.tokens).items():
        before, missing = len(sequences), budget
        for sequence in by_part[key]:
            if missing <= 0:
                break
            unfinished += sequence.kind == "traces" and not sequence.finished
            longest = min(missing, settings.max_sequence_tokens or missing)
            if len(sequence.ids) > longest:
                sequence, truncated = sequence.cut(longest), truncated + 1
            sequences.append(sequence)
            missing -= len(sequence.ids)
        if missing > 0:
            raise RacError(
                f"the {key} part of the calibration set has {budget - missing:,} tokens but its "
                f"share asks for {budget:,}; "
                f"lower calibration.tokens, or give more {Part.parse(key).kind}"
            )
        counts[key] = {"tokens": budget, "sequences": len(sequences) - before}
    random.Random(f"{settings.seed}/order").shuffle(sequences)
    composition = replace(compose(sequences, truncated, unfinished), parts=counts)
    if not composition.trace_tokens and any(Part.parse(key).kind == "traces" for key in counts):
        raise RacError(
            "the calibration set is meant to hold chain-of-thought traces but has no token of any: "
            "the traces may be empty or cut away by max_sequence_tokens; look at the store with "
            "`rac traces inspect`"
        )
    return sequences, composition


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


def generic_token_sequences(tokenizer: Any, source: GenericText, seed: int) -> Iterator[list[int]]:
    """Yield `source.sequence_tokens` ids at a time; documents are shuffled by seed, read as needed.

    More documents than the shuffling buffer holds are shuffled within it, as `datasets` does.
    """
    texts = _texts(source)
    first = next(texts, None)
    if first is None:
        raise RacError(
            f"generic text {source.source!r} holds no text; name another source or column"
        )
    ids: list[int] = []
    for document in _shuffled(chain([first], texts), random.Random(f"{seed}/generic")):
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        while len(ids) >= source.sequence_tokens:
            yield ids[: source.sequence_tokens]
            ids = ids[source.sequence_tokens :]


def _shuffled(documents: Iterator[str], rng: random.Random) -> Iterator[str]:
    buffer = list(islice(documents, _BUFFER))
    rng.shuffle(buffer)
    for document in documents:
        place = rng.randrange(_BUFFER)
        yield buffer[place]
        buffer[place] = document
    yield from buffer


def _texts(source: GenericText) -> Iterator[str]:
    if source.source == "python-docs":  # about 150,000 tokens, in every Python
        from pydoc_data.topics import topics

        yield from (topics[key] for key in sorted(topics))
        return
    column = "text" if Path(source.source).suffix == ".txt" else source.column
    if column is None:
        raise RacError(
            f'generic text {source.source!r} needs the name of its text column, e.g. column: "text"'
        )
    rows = stream_rows(
        source.source, label="generic text", config=source.config, split=source.split
    )
    for number, row in enumerate(rows, 1):
        text = row.get(column)
        if not isinstance(text, str):
            raise RacError(
                f"generic text {source.source!r}, row {number} has no text in column {column!r}; "
                f"its columns are {', '.join(row) or 'none'}"
            )
        yield text
