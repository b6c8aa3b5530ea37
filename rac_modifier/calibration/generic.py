"""Generic text, cut into sequences of token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rac_modifier.calibration.settings import GenericText
from rac_modifier.errors import RacError


def generic_token_sequences(tokenizer: Any, source: GenericText, seed: int) -> Iterator[list[int]]:
    """Sequences of `source.sequence_tokens` ids without special tokens, documents shuffled by seed.

    Raises:
        RacError: no such file or column, or no text in it.
    """
    texts = _texts(source)
    first = next(texts, None)
    if first is None:
        raise RacError(f"generic text {source.source!r} holds no text; name another source or column")
    documents = [first, *texts]
    random.Random(f"{seed}/generic").shuffle(documents)
    rest: list[int] = []
    for document in documents:
        rest += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        while len(rest) >= source.sequence_tokens:
            yield rest[: source.sequence_tokens]
            rest = rest[source.sequence_tokens :]


def _texts(source: GenericText) -> Iterator[str]:
    if source.source == "python-docs":
        yield from _python_docs()
        return
    path = Path(source.source)
    if path.suffix == ".txt":
        if not path.is_file():
            raise RacError(f"generic text {source.source!r}: no such file; give a path, a dataset or python-docs")
        yield path.read_text(encoding="utf-8")
        return
    if source.column is None:
        raise RacError(f'generic text {source.source!r} needs the name of its text column, e.g. column: "text"')
    for row in _rows(source, path):
        if source.column not in row:
            raise RacError(
                f"generic text {source.source!r} has no column {source.column!r}; it has {', '.join(map(str, row))}"
            )
        yield str(row[source.column])


def _rows(source: GenericText, path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".jsonl":
        if not path.is_file():
            raise RacError(f"generic text {source.source!r}: no such file; give a path, a dataset or python-docs")
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
        return
    import datasets

    if path.suffix == ".parquet":
        yield from datasets.load_dataset("parquet", data_files=str(path), split="train")
        return
    yield from datasets.load_dataset(source.source, source.config, split=source.split, streaming=True)


def _python_docs() -> Iterator[str]:
    """The last fifth of Python's documentation topics: the embedded reasoner was trained on the rest."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[key] for key in sorted(topics))
    text = text[len(text) * 4 // 5 :]
    for at in range(0, len(text), 4000):
        yield text[at : at + 4000]
