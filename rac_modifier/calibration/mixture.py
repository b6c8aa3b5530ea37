"""Take calibration sequences up to a budget of real tokens, and count their tokens."""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

from rac_modifier.errors import RacError
from rac_modifier.problems.source import stream_rows
from rac_modifier.settings.calibration import CalibrationSettings, GenericText, part_tokens

_BUFFER = 10_000  # documents


@dataclass(frozen=True)
class CalibrationSequence:
    """Token ids of a calibration sequence; the first `prompt_tokens` are the prompt."""

    ids: tuple[int, ...]
    prompt_tokens: int
    kind: str
    finished: bool = True

    def cut(self, length: int) -> Self:
        """Return the first `length` tokens."""
        prompt = min(self.prompt_tokens, length)
        return replace(self, ids=self.ids[:length], prompt_tokens=prompt, finished=False)


def mix(
    by_part: Mapping[str, Iterable[CalibrationSequence]], settings: CalibrationSettings
) -> tuple[list[CalibrationSequence], dict[str, Any]]:
    """Fill each part's share of the budget, exactly to the token, and shuffle.

    Return the sequences, and counts for the run record. RacError for a part that has fewer tokens
    than its share, or traces without completions.
    """
    sequences: list[CalibrationSequence] = []
    parts: dict[str, dict[str, int]] = {}
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
                f"the {key} part of the calibration set has {budget - missing:,} tokens, and its "
                f"share is {budget:,}; lower calibration.tokens, or give more of it"
            )
        parts[key] = {"tokens": budget, "sequences": len(sequences) - before}
    random.Random(f"{settings.seed}/order").shuffle(sequences)
    tokens = sum(len(s.ids) for s in sequences)
    generic = sum(len(s.ids) for s in sequences if s.kind == "generic")
    prompt = sum(s.prompt_tokens for s in sequences if s.kind != "generic")
    if settings.parts("traces") and tokens == generic + prompt:
        raise RacError(
            "the calibration set has no token of a chain of thought: traces are empty, or cut away "
            "by max_sequence_tokens; look at the store with `rac traces inspect`"
        )
    return sequences, {
        "tokens": tokens,
        "prompt_tokens": prompt,
        "trace_tokens": tokens - generic - prompt,
        "generic_tokens": generic,
        "sequences": len(sequences),
        "truncated_sequences": truncated,
        "unfinished_traces": unfinished,
        "parts": parts,
    }


def generic_token_sequences(tokenizer: Any, source: GenericText, seed: int) -> Iterator[list[int]]:
    """Yield `source.sequence_tokens` ids at a time; documents are shuffled by seed in a buffer."""
    ids: list[int] = []
    for document in _shuffled(_texts(source), random.Random(f"{seed}/generic")):
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
        raise RacError(f"generic text {source.source!r} needs the name of its text column")
    where: dict[str, Any] = {"config": source.config, "split": source.split}
    rows = stream_rows(source.source, label="generic text", **where)
    for number, row in enumerate(rows, 1):
        text = row.get(column)
        if not isinstance(text, str):
            raise RacError(
                f"generic text {source.source!r}, row {number} has no text in column {column!r}; "
                f"its columns are {', '.join(row) or 'none'}"
            )
        yield text
