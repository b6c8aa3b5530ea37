"""A trace store as a Parquet file, written with `datasets` a thousand traces at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.traces.store import TraceStore

_ROWS = 1000


def export_parquet(store: TraceStore, output: Path, tokenizer: Any | None = None) -> int:
    """Write each trace as a row with its ids; with a tokenizer also `prompt` and `completion` as text, with tags and EOS.

    The file has its name only when it is complete. Returns the number of rows.

    Raises:
        RacError: another suffix, an empty store, or the file cannot be written.
    """
    if output.suffix != ".parquet":
        raise RacError(
            f"{str(output)!r} does not end in .parquet; name the file that is to be written"
        )
    if not output.absolute().parent.is_dir():
        raise RacError(f"{str(output)!r}: its folder does not exist; create it first")
    if not len(store):
        raise RacError(f"trace store {str(store.path)!r} holds no traces; collect some first")
    from datasets import Features, IterableDataset, Sequence, Value

    features = {
        "id": Value("string"),
        "problem_id": Value("string"),
        "prompt_ids": Sequence(Value("int32")),
        "completion_ids": Sequence(Value("int32")),
        "finish_reason": Value("string"),
        "seed": Value("int64"),
        "question": Value("string"),
        "answer": Value("string"),
    }
    if tokenizer is not None:
        features |= {"prompt": Value("string"), "completion": Value("string")}

    def rows() -> Iterator[dict[str, Any]]:
        for trace in store:
            row = asdict(trace)
            if tokenizer is not None:
                row["prompt"] = tokenizer.decode(list(trace.prompt_ids))
                row["completion"] = tokenizer.decode(list(trace.completion_ids))
            yield row

    partial = output.with_name(f"{output.name}.partial")
    try:
        IterableDataset.from_generator(rows, features=Features(features)).to_parquet(
            str(partial), batch_size=_ROWS
        )
        os.replace(partial, output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RacError(
            f"{str(output)!r} cannot be written ({error}); make room, or name another file"
        ) from error
    return len(store)
