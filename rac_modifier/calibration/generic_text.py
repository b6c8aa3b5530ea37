"""Generic text, cut into sequences of token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import GenericText

_BUFFER = 10_000  # documents


def generic_token_sequences(tokenizer: Any, source: GenericText, seed: int) -> Iterator[list[int]]:
    """Sequences of `source.sequence_tokens` ids without special tokens, documents shuffled by seed, read as they are needed.

    A source of more documents than fit the shuffling buffer is shuffled within it, as `datasets` shuffles streams.

    Raises:
        RacError: no such file or column, or no text in it.
    """
    texts = _texts(source)
    first = next(texts, None)
    if first is None:
        raise RacError(f"generic text {source.source!r} holds no text; name another source or column")
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
    path = Path(source.source)
    if path.suffix in (".txt", ".jsonl", ".parquet") and not path.is_file():
        raise RacError(f"generic text {source.source!r}: no such file; give a path, a dataset or python-docs")
    if path.suffix == ".txt":
        yield path.read_text(encoding="utf-8")
        return
    if source.column is None:
        raise RacError(f'generic text {source.source!r} needs the name of its text column, e.g. column: "text"')
    for number, row in enumerate(_rows(source, path), 1):
        text = row.get(source.column)
        if not isinstance(text, str):
            raise RacError(
                f"generic text {source.source!r}, row {number} has no text in column {source.column!r}; "
                f"its columns are {', '.join(map(str, row)) or 'none'}"
            )
        yield text


def _rows(source: GenericText, path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield _json_object(line, f"generic text {source.source!r}, line {number}")
        return
    import datasets

    try:
        if path.suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(source.source, source.config, split=source.split, streaming=True)
    # What load_dataset raises depends on the hub, the dataset and the network: pass its words on, with the way out.
    except Exception as error:
        raise RacError(
            f"generic text {source.source!r} could not be loaded ({type(error).__name__}: {error}); check its name, "
            "split and config, or use a local file or python-docs, which need no download"
        ) from error
    yield from rows


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RacError(f"{where} is not JSON ({error}); repair or remove it") from error
    if not isinstance(row, dict):
        raise RacError(f"{where} is a {type(row).__name__}; each line must be an object with named columns")
    return row


def _python_docs() -> Iterator[str]:
    """Python's documentation topics, about 150,000 tokens. (The embedded reasoner has seen four fifths of them.)"""
    from pydoc_data.topics import topics

    for key in sorted(topics):
        yield topics[key]
