"""Rows of a file or of a Hugging Face dataset, all read with `datasets`; local files need no network."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rac_modifier.errors import RacError
from rac_modifier.files import regular_file

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# By suffix: the loader of `datasets`, and its options.
_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {"parse_agent_traces": False}),
    ".json": ("json", {"parse_agent_traces": False}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "document"}),
}
_OTHER_SOURCES = "name a local file or a built-in source, none of which needs a download"


def is_file(source: str) -> bool:
    """Whether a source is a path to a file, by its suffix, rather than the id of a dataset."""
    return Path(source).suffix in _LOADERS


def open_table(
    source: str, *, what: str, config: str | None = None, split: str = "train"
) -> Dataset:
    """All rows of a source: a .jsonl, .json (a list of objects), .parquet or .txt file, or a Hugging Face dataset.

    The rows stay on disk until they are read one by one. An empty file gives no rows and no columns.

    Args:
        source: path or dataset id.
        what: the source's part in the run, for messages: "problem file".
        config: configuration of a dataset.
        split: split of a dataset.

    Raises:
        RacError: no such file, malformed content, or a dataset, configuration or split that cannot be loaded.
    """
    return cast("Dataset", _load(source, what, config, split, streaming=False))


def stream_rows(
    source: str, *, what: str, config: str | None = None, split: str = "train"
) -> Iterator[Mapping[str, Any]]:
    """The rows of a source one after the other, read (and downloaded) only as far as the iterator advances.

    Raises:
        RacError: as `open_table`; malformed content is found when it is reached.
    """
    rows = iter(_load(source, what, config, split, streaming=True))
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _unreadable(source, what, config, split, error) from error
        yield row


def _load(
    source: str, what: str, config: str | None, split: str, *, streaming: bool
) -> Dataset | IterableDataset:
    path = Path(source).expanduser()
    if is_file(source) and not path.exists():
        raise RacError(
            f"{what} {source!r}: no such file; check the path (it is relative to {Path.cwd()})"
        )
    if is_file(source):
        regular_file(path, what)
    import datasets  # loading it takes half a second, and most runs read neither file nor dataset

    if is_file(source) and _is_empty(path):
        return datasets.Dataset.from_dict({})
    try:
        if is_file(source):
            loader, options = _LOADERS[path.suffix]
            files = glob.escape(str(path.absolute()))  # data_files takes patterns
            return datasets.load_dataset(
                loader, data_files=files, split="train", streaming=streaming, **options
            )
        return datasets.load_dataset(source, config, split=split, streaming=streaming)
    # What load_dataset raises depends on the format, the hub and the network: its words are passed on.
    except Exception as error:
        raise _unreadable(source, what, config, split, error) from error


def _is_empty(path: Path) -> bool:
    """Whether a file holds no row; `datasets` has no clear error for that."""
    if path.suffix == ".parquet":
        return False
    with path.open("rb") as file:
        start = file.read(1 << 16).strip()
    return not start or (path.suffix == ".json" and start in (b"[]", b"{}"))


def _unreadable(
    source: str, what: str, config: str | None, split: str, error: Exception
) -> RacError:
    cause = error.__cause__ or error
    words = " ".join(f"{type(cause).__name__}: {cause}".split())[:500]
    if not is_file(source):
        return RacError(
            f"{what} {source!r} (config {config!r}, split {split!r}) could not be loaded ({words}); check the name, the "
            f"split and the config, or {_OTHER_SOURCES}"
        )
    path = Path(source).expanduser()
    if path.suffix == ".jsonl" and (bad := _first_bad_line(path)):
        return RacError(f"{what} {source!r}, {bad}; repair or remove that line")
    form = {
        ".json": "a list of objects in JSON",
        ".jsonl": "one JSON object per line",
        ".parquet": "Parquet",
    }
    return RacError(
        f"{what} {source!r} could not be read ({words}); it must hold {form.get(path.suffix, 'text in UTF-8')}: repair the "
        "file or name another"
    )


def _first_bad_line(path: Path) -> str | None:
    """Which line of a JSONL file is not a JSON object, or else is empty; None if there is neither."""
    empty = None
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                empty = empty or f"line {number} is empty"
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                return f"line {number} is not JSON ({error})"
            if not isinstance(value, dict):
                return (
                    f"line {number} is a {type(value).__name__}, not an object with named columns"
                )
    return empty  # an empty line is read over, except where the values of a column are of several types
