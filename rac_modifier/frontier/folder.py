"""The folder of a frontier: a line per finished row, the traces of each, and what all share."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.files import lock, read_json, write_json_atomic, write_text_atomic

VERSION = 2  # changes when a reader of the old files would misread the new ones
ROWS, ABOUT, TRACES, MODELS = "rows.jsonl", "frontier.json", "traces", "models"
BENCHMARKS = "benchmarks.jsonl"


class FrontierFolder:
    """The results of `rac frontier`. As a context manager it holds the folder's lock, for writing.

    Attributes:
        about: what all rows share (frontier.json): the dense model, the problems, the sampling.
        rows: the finished rows (rows.jsonl), in the order in which they finished.
        benchmarks: results of published benchmarks (benchmarks.jsonl), each with the label of
            its row and the benchmark's name.
    """

    def __init__(self, folder: Path):
        """Read the folder; an unfinished last line, which a kill leaves, is left out.

        Raises:
            RacError: results of another version, or a damaged file.
        """
        self.folder = folder
        self._read()

    def _read(self) -> None:
        self.about: dict[str, Any] = {}
        if (self.folder / ABOUT).exists():
            self.about = read_json(self.folder / ABOUT)
            _check_version(self.about, self.folder / ABOUT)
        self.rows, self._end = _read_rows(self.folder / ROWS)
        self.benchmarks, self._benchmarks_end = _read_rows(self.folder / BENCHMARKS)

    @classmethod
    def read(cls, folder: Path) -> FrontierFolder:
        """Read a folder with at least one row, for the page.

        Raises:
            RacError: no results, or results of another version.
        """
        results = cls(folder)
        if not results.about or not results.rows:
            raise RacError(
                f"{folder} holds no results of rac frontier; make them with: rac frontier MODEL "
                f"--out {folder} ..."
            )
        return results

    def begin(self, about: Mapping[str, Any]) -> None:
        """Write what all rows share, or `check` it."""
        self.check(about)
        if not self.about:
            self.about = {"version": VERSION, **about}
            write_json_atomic(self.folder / ABOUT, self.about)

    def check(self, about: Mapping[str, Any]) -> None:
        """Check that the finished rows share this; nothing is written.

        Raises:
            RacError: the folder is of another model, other problems or other sampling.
        """
        if self.rows and not self.about:
            raise RacError(
                f"{self.folder / ROWS} has rows and {ABOUT} is missing; put it back, or name "
                "another folder"
            )
        for key, value in about.items():
            if self.about and self.about.get(key) != value:
                recorded, now = (json.dumps(v)[:200] for v in (self.about.get(key), value))
                raise RacError(
                    f"{self.folder} was measured with another {key} ({recorded} there, {now} now), "
                    "and rows of both cannot be compared; name another folder"
                )

    def row(self, label: str) -> dict[str, Any] | None:
        """Return the finished row of this label."""
        return next((row for row in self.rows if row["label"] == label), None)

    def add(self, row: Mapping[str, Any], traces: list[dict[str, Any]]) -> None:
        """Keep a finished row; its traces are written first, so that a row never lacks them.

        Raises:
            RacError: nothing can be written.
        """
        content = {"version": VERSION, "traces": traces}
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        path = self._traces(row["label"])
        try:
            path.parent.mkdir(exist_ok=True)
            write_text_atomic(path, text + "\n")
        except OSError as error:
            raise _not_written(path.parent, error) from error
        self._end = _append(self.folder / ROWS, self._end, row, self.rows)

    def benchmark(self, label: str, name: str) -> dict[str, Any] | None:
        """Return the result of a benchmark for the row of this label."""
        key = (label, name)
        return next((b for b in self.benchmarks if (b["label"], b.get("benchmark")) == key), None)

    def add_benchmark(self, label: str, name: str, values: Mapping[str, Any]) -> None:
        """Keep the result of a benchmark for the row of this label."""
        values = {"label": label, "benchmark": name, **values}
        path = self.folder / BENCHMARKS
        self._benchmarks_end = _append(path, self._benchmarks_end, values, self.benchmarks)

    def traces(self, label: str) -> list[dict[str, Any]]:
        """Return the traces of a finished row.

        Raises:
            RacError: the file is missing, damaged or of another version.
        """
        path = self._traces(label)
        content = read_json(path)
        _check_version(content, path)
        traces = content.get("traces")
        if not isinstance(traces, list) or not all(
            isinstance(trace, dict) and "id" in trace for trace in traces
        ):
            raise RacError(
                f"{path}: holds no traces; remove the line of {label!r} in {ROWS}, and run the "
                "grid again"
            )
        return traces

    def model(self, label: str) -> Path:
        """Return the folder of a row's checkpoint."""
        return self.folder / MODELS / slug(label)

    def _traces(self, label: str) -> Path:
        return self.folder / TRACES / f"{slug(label)}.json"

    def __enter__(self) -> FrontierFolder:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise RacError(
                f"{self.folder}: cannot be written to ({error}); name another folder"
            ) from error
        try:
            if not lock(self._lock.fileno(), self.folder, patience=0):
                raise RacError(
                    f"{self.folder} is in use by another rac frontier; wait for it, or name "
                    "another folder"
                )
            self._read()  # another rac frontier may have added rows until it released the lock
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()


def slug(label: str) -> str:
    """Return the file name of a label: letters, digits, and a hash that keeps labels apart."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")[:60]
    return f"{words}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _append(path: Path, end: int, values: Mapping[str, Any], rows: list[dict[str, Any]]) -> int:
    """Add a line after the last whole line, to the file and to `rows`; return the file's end."""
    line = json.dumps({"version": VERSION, **values}, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        with path.open("ab") as file:
            file.truncate(end)
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
            end = file.tell()
    except OSError as error:
        raise _not_written(path, error) from error
    rows.append(json.loads(line))
    return end


def _not_written(path: Path, error: OSError) -> RacError:
    return RacError(
        f"{path}: cannot be written ({error}); make room, and run the same command again"
    )


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows, and the length of the file up to the end of the last whole line."""
    if not path.exists():
        return [], 0
    try:
        complete = path.read_bytes().rpartition(b"\n")[0]
    except OSError as error:
        raise RacError(f"{path}: cannot be read ({error})") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row, why = None, f"not JSON ({error})"
        else:
            why = "no row of rac frontier"
        if not isinstance(row, dict) or not isinstance(row.get("label"), str):
            raise RacError(
                f"{path}, line {number}: {why}; remove this line, and run the grid again"
            )
        _check_version(row, path)
        rows.append(row)
    return rows, len(complete) + 1 if complete else 0


def _check_version(content: Mapping[str, Any], path: Path) -> None:
    if content.get("version") != VERSION:
        raise RacError(
            f"{path} is of version {content.get('version')!r}, and this package reads and writes "
            f"version {VERSION}; use the package that wrote it, or name another folder"
        )
