"""The folder of a frontier: a line per finished row, the traces of each, and what all share."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from rac_modifier.errors import RacError, refusing
from rac_modifier.evaluation.results import PairedDifference
from rac_modifier.runtime.files import hold, read_json, write_json_atomic, write_text_atomic

VERSION = 2  # changes when a reader of the old files would misread the new ones
ROWS, ABOUT, TRACES, MODELS = "rows.jsonl", "frontier.json", "traces", "models"


class _Bytes(BaseModel):
    total: int
    matrices: int
    bits_per_weight: float


class _Ending(BaseModel):
    kind: str


class _Accuracy(BaseModel):
    accuracy: float
    ci_low: float
    ci_high: float
    endings: dict[str, list[_Ending]]


class _Divergence(BaseModel):
    kl: float
    kl_stderr: float | None
    agreement: float


class _Experts(BaseModel):
    kept: list[list[int]]
    saliency: list[list[float]]


class _Row(BaseModel):
    """What the page and the next rows read of a line; it may hold more."""

    label: str
    group: str
    recipe: dict[str, Any] | None
    bytes: _Bytes
    thinking: float
    truncated: float
    accuracy: _Accuracy | None
    divergence: _Divergence | None
    paired: PairedDifference | None
    served: dict[str, float | str] | None
    experts_removed: _Experts | None = None


class _Evaluation(BaseModel):
    source: str
    problems: int
    cap: int
    temperature: float


class _About(BaseModel):
    """What the page reads of frontier.json; it may hold more."""

    model: str
    evaluation: _Evaluation


class FrontierFolder:
    """The results of `rac frontier`. As a context manager it holds the folder's lock, for writing.

    `about` is what all rows share (frontier.json); `rows` are the finished rows (rows.jsonl).
    """

    def __init__(self, folder: Path):
        """Read the folder (RacError: results of another version, or a damaged file)."""
        self.folder = folder
        self._read()

    def _read(self) -> None:
        self.about: dict[str, Any] = {}
        self.rows = _read_rows(self.folder / ROWS)
        if not self.rows:
            return
        self.about = read_json(self.folder / ABOUT, "put it back, or name another folder")
        if (version := self.about.get("version")) != VERSION:
            raise RacError(
                f"{self.folder / ABOUT} is of version {version!r}, and this package reads and "
                f"writes version {VERSION}; use the package that wrote it, or name another folder"
            )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a folder for the page (RacError: no results, or results of another version)."""
        results = cls(folder)
        if not results.rows:
            raise RacError(
                f"{folder} holds no results; make them with: rac frontier MODEL --out {folder} ..."
            )
        step = "put it back, or run the grid anew"
        with refusing(f"{folder / ABOUT}: damaged", step, ValueError):
            _About.model_validate(results.about)
        return results

    def begin(self, about: Mapping[str, Any], *, check: bool = False) -> None:
        """Write what all rows share (RacError: the rows have another); `check`: write nothing."""
        for key, value in about.items():
            if self.rows and self.about.get(key) != value:
                recorded, now = (json.dumps(v)[:200] for v in (self.about.get(key), value))
                raise RacError(
                    f"{self.folder} was measured with another {key} ({recorded} there, {now} now), "
                    "and rows of both cannot be compared; name another folder"
                )
        if not self.rows and not check:
            self.about = {"version": VERSION, **about}
            write_json_atomic(self.folder / ABOUT, self.about)

    def row(self, label: str) -> dict[str, Any] | None:
        """Return the finished row of this label."""
        return next((row for row in self.rows if row["label"] == label), None)

    def add(self, row: Mapping[str, Any], traces: list[dict[str, Any]]) -> None:
        """Keep a finished row; its traces are written first, so that a row never lacks them."""
        write_text_atomic(self._traces(row["label"]), _line({"version": VERSION, "traces": traces}))
        rows = [*self.rows, json.loads(_line({"version": VERSION, **row}))]
        write_text_atomic(self.folder / ROWS, "".join(map(_line, rows)))
        self.rows = rows

    def traces(self, label: str) -> list[dict[str, Any]]:
        """Return the traces of a finished row (RacError: the file is missing or damaged)."""
        path = self._traces(label)
        next_step = f"remove the line of {label!r} in {ROWS}, and run the grid again"
        traces = read_json(path, next_step).get("traces")
        if not isinstance(traces, list):
            raise RacError(f"{path}: holds no traces; {next_step}")
        return traces

    def model(self, label: str) -> Path:
        """Return the folder of a row's checkpoint."""
        return self.folder / MODELS / slug(label)

    def _traces(self, label: str) -> Path:
        return self.folder / TRACES / f"{slug(label)}.json"

    def __enter__(self) -> Self:
        step = "name another folder"
        with refusing(f"{self.folder}: cannot be written to", step, OSError):
            (self.folder / TRACES).mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.folder, step)
        try:
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


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    step = "remove this line, and run the grid again"
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), 1):
        problem = f"{path}, line {number}: no row of rac frontier"
        with refusing(problem, step, ValueError, RecursionError):
            rows.append(json.loads(line))
            _Row.model_validate(rows[-1])
    return rows
