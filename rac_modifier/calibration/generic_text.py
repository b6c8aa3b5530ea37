"""Generic text, cut into sequences of token ids."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.problems.tables import stream_rows
from rac_modifier.settings.calibration import GenericText

_BUFFER = 10_000  # documents


def generic_token_sequences(tokenizer: Any, source: GenericText, seed: int) -> Iterator[list[int]]:
    """Sequences of `source.sequence_tokens` ids without special tokens; documents are shuffled by seed and read as needed.

    A source of more documents than the shuffling buffer holds is shuffled within the buffer, as `datasets` shuffles streams.

    Raises:
        RacError: no such file or column, or no text in it.
    """
    texts = _texts(source)
    first = next(texts, None)
    if first is None:
        raise RacError(
            f"generic text {source.source!r} holds no text; name another source or column"
        )
    rest: list[int] = []
    for document in _shuffled(chain([first], texts), random.Random(f"{seed}/generic")):
        rest += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        while len(rest) >= source.sequence_tokens:
            yield rest[: source.sequence_tokens]
            rest = rest[source.sequence_tokens :]


def _shuffled(documents: Iterator[str], rng: random.Random) -> Iterator[str]:
    buffer = list(islice(documents, _BUFFER))
    rng.shuffle(buffer)
    for document in documents:
        place = rng.randrange(_BUFFER)
        yield buffer[place]
        buffer[place] = document
    yield from buffer


def _texts(source: GenericText) -> Iterator[str]:
    if source.source == "python-docs":
        yield from _python_docs()
        return
    column = "text" if Path(source.source).suffix == ".txt" else source.column
    if column is None:
        raise RacError(
            f'generic text {source.source!r} needs the name of its text column, e.g. column: "text"'
        )
    rows = stream_rows(source.source, what="generic text", config=source.config, split=source.split)
    for number, row in enumerate(rows, 1):
        text = row.get(column)
        if not isinstance(text, str):
            raise RacError(
                f"generic text {source.source!r}, row {number} has no text in column {column!r}; "
                f"its columns are {', '.join(row) or 'none'}"
            )
        yield text


def _python_docs() -> Iterator[str]:
    """Python's documentation topics, about 150,000 tokens. (The embedded reasoner was trained on four fifths of them.)"""
    from pydoc_data.topics import topics

    for key in sorted(topics):
        yield topics[key]
