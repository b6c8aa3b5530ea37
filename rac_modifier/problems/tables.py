"""Finite problem sets as tables: a JSON, JSONL or Parquet file, or a Hugging Face dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rac_modifier.errors import RacError


@dataclass(frozen=True)
class Table:
    """A finite set of rows whose columns are known before its rows are read."""

    where: str
    columns: list[str]
    read: Callable[[list[str]], Sequence[Mapping[str, Any]]]
    """Rows that hold at least the named columns; a long text column that nobody asked for stays on disk."""


def open_file(path: Path) -> Table:
    """Open a .jsonl, .json (a list of objects) or .parquet file.

    Raises:
        RacError: no such file, or not in the format that its suffix promises.
    """
    if not path.is_file():
        raise RacError(f"problem file {str(path)!r}: no such file; check the path (it is relative to {Path.cwd()})")
    if path.suffix == ".parquet":
        return _parquet(path)
    rows = _jsonl_rows(path) if path.suffix == ".jsonl" else _json_rows(path)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Table(str(path), columns, lambda _names: rows)


def open_dataset(name: str, config: str | None, split: str) -> Table:
    """Load a Hugging Face dataset, from the hub or from its local cache.

    Raises:
        RacError: `datasets` is not installed, or it cannot load this dataset, configuration or split.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise RacError(
            f"problem source {name!r} is a Hugging Face dataset, which needs `pip install datasets`"
        ) from error
    try:
        data = load_dataset(name, config, split=split)
    # What load_dataset raises depends on the hub, the dataset and the network: pass its words on, with the way out.
    except Exception as error:
        raise RacError(
            f"dataset {name!r} (config {config!r}, split {split!r}) could not be loaded: {type(error).__name__}: "
            f"{error}. Check the name, split and config, or name a local .jsonl, .json or .parquet file, 'arithmetic' "
            "or 'reasoning-gym:<task>', none of which needs a download"
        ) from error
    return Table(f"{name} [{split}]", list(data.column_names), data.select_columns)


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = list(pyarrow.parquet.ParquetFile(path).schema_arrow.names)
    except (pyarrow.ArrowException, OSError) as error:
        raise RacError(f"problem file {str(path)!r} cannot be read as Parquet: {error}") from error
    return Table(str(path), columns, lambda names: pyarrow.parquet.read_table(path, columns=names).to_pylist())


def _jsonl_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_object(_parse(line, f"{path}, line {number}"), f"{path}, line {number}"))
    return rows


def _json_rows(path: Path) -> list[dict[str, Any]]:
    data = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(data, list):
        raise RacError(f"problem file {str(path)!r} must hold a list of objects, not a {type(data).__name__}")
    return [_object(row, f"{path}, row {index}") for index, row in enumerate(data)]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RacError(f"{where} is not JSON: {error}; repair or remove it") from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise RacError(f"{where} must be an object with named columns, not a {type(row).__name__}")
    return row
