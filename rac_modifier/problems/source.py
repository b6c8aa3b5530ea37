"""Where questions come from: arithmetic, reasoning-gym, a file, or a hub dataset.

Tables are read with `datasets`; files need no network.
"""

import difflib
import glob
import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac_modifier.errors import RacError
from rac_modifier.problems.answers import Verifier
from rac_modifier.problems.arithmetic import generate_distinct
from rac_modifier.runtime.files import regular_file
from rac_modifier.settings.problems import ARITHMETIC, GYM_PREFIX, ProblemSource

if TYPE_CHECKING:
    from datasets import Dataset

QUESTION_COLUMNS = ("problem", "question", "prompt")
_GYM_CHUNK = 500
_GYM_TEST = "test/"  # before the number, in the id of a held-out item
_EXACT_FLOATS = 2.0**53  # integers below are exact in the float64 that larger JSON integers become


@dataclass(frozen=True)
class Problem:
    """A question; `id` depends on the problem alone, so it stays the same when a limit changes."""

    id: str
    question: str
    answer: str | None
    task: str | None
    item: tuple[str, int, int, int] | None = None  # task, seed, size and index in reasoning-gym

    @property
    def verifier(self) -> Verifier | None:
        """Return the scorer of a reasoning-gym task; None: answers are compared as mathematics."""
        if (item := self.item) is None:
            return None
        from rac_modifier.problems.answer_checker import check_answer  # needs loguru

        return lambda answer, _: check_answer("reasoning-gym", answer, *item)


def load_problems(source: ProblemSource, seed: int, *, held_out: bool = False) -> Iterator[Problem]:
    """Open a source (RacError), and return its problems in the seed's order.

    `held_out`: of reasoning-gym, other problems than those for calibration.
    """
    problems: Iterator[Problem]
    if source.source == ARITHMETIC:
        solved = generate_distinct(seed, "calibration")
        problems = (Problem(s.identity, s.question, s.answer, s.task) for s in solved)
    elif source.source.startswith(GYM_PREFIX):
        problems = _reasoning_gym(source.source.removeprefix(GYM_PREFIX), seed, held_out)
    else:
        problems = _from_table(source, seed)
    return islice(problems, source.limit)


def _reasoning_gym(names: str, seed: int, held_out: bool) -> Iterator[Problem]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise RacError(
            f"source {GYM_PREFIX + names!r} needs `pip install 'rac-modifier[reasoning-gym]'`"
        ) from error
    split = _GYM_TEST if held_out else ""
    tasks = [name.strip() for name in names.split(",")]
    for name in tasks:
        if name not in DATASETS:
            close = difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)[:5]
            raise RacError(f"unknown reasoning-gym task {name!r}; did you mean {', '.join(close)}?")

    def of_task(name: str) -> Iterator[Problem]:
        # reasoning-gym seeds item i with seed + i: neighbouring seeds would share nearly all items.
        for chunk in count():
            chunk_seed = _gym_seed(split, name, seed, chunk)
            items = reasoning_gym.create_dataset(name, seed=chunk_seed, size=_GYM_CHUNK)
            for index in range(_GYM_CHUNK):
                item, number = items[index], chunk * _GYM_CHUNK + index
                where = (name, chunk_seed, _GYM_CHUNK, index)
                identity = f"{name}:{split}{number}"
                yield Problem(identity, item["question"], str(item["answer"]), name, where)

    def in_turn() -> Iterator[Problem]:
        streams = [of_task(name) for name in tasks]
        while True:
            yield from map(next, streams)

    return in_turn()


def _gym_seed(split: str, name: str, seed: int, chunk: int) -> int:
    return _hash_int(f"{split}{seed}/{name}/{chunk}") % 2**31


def gym_item(source: ProblemSource, seed: int, problem_id: str) -> tuple[str, int, int, int] | None:
    """Return task, seed, size and index in reasoning-gym of a problem; None for other sources."""
    if not source.source.startswith(GYM_PREFIX):
        return None
    name, _, number = problem_id.rpartition(":")
    split = _GYM_TEST if number.startswith(_GYM_TEST) else ""
    chunk, index = divmod(int(number.removeprefix(split)), _GYM_CHUNK)
    return name, _gym_seed(split, name, seed, chunk), _GYM_CHUNK, index


def _from_table(source: ProblemSource, seed: int) -> Iterator[Problem]:
    table = ProblemTable(source)
    column, answer_column = source.column, source.answer_column
    if column is None:
        candidates = [name for name in QUESTION_COLUMNS if name in table.columns]
        if len(candidates) != 1:
            raise RacError(
                f"{table.name}: set `column` (the question's) to one of: {', '.join(table.columns)}"
            )
        column = candidates[0]

    def problem(row: TableRow) -> Problem:
        answer = None if answer_column is None else row.answer(answer_column)
        return row.problem(row.question(column), answer)

    columns = [column] if answer_column is None else [column, answer_column]
    return map(problem, table.shuffled(columns, seed))


@dataclass(frozen=True)
class TableRow:
    """A row of a table; `where` names it in messages."""

    index: int
    where: str
    values: Mapping[str, Any]

    def question(self, column: str) -> str:
        """Return the question; a row without text there is a RacError."""
        question = self.values[column]
        if not isinstance(question, str) or not question.strip() or _is_broken(question):
            raise RacError(
                f"{self.where}: column {column!r} must hold the question as text, it "
                f"holds {repr(question)[:80]}; choose another column"
            )
        return question

    def answer(self, column: str) -> str | None:
        """Return the answer as text, None for null and NaN (RacError: not text, lost digits)."""
        answer = self.values[column]
        if isinstance(answer, float) and math.isnan(answer):
            answer = None  # as pandas writes a missing number
        inexact = isinstance(answer, float) and abs(answer) >= _EXACT_FLOATS
        broken = isinstance(answer, str) and _is_broken(answer)
        if inexact or broken or not isinstance(answer, str | int | float | None):
            raise RacError(
                f"{self.where}: column {column!r} holds the {type(answer).__name__} "
                f"{repr(answer)[:80]}, maybe not as written; write answers as text, in quotes"
            )
        if isinstance(answer, float):
            return f"{Decimal(str(answer)):f}"  # 0.00001, not 1e-05
        return None if answer is None else str(answer)

    def problem(self, question: str, answer: str | None, task: str | None = None) -> Problem:
        """Return a problem; its id makes an edited row another problem for a resumed run."""
        name = f"row{self.index}-{_hash_int(question) % 16**8:08x}"
        return Problem(name, question, answer, task)


class ProblemTable:
    """The table of a source that is a file or a dataset; `name` is its name in messages."""

    def __init__(self, source: ProblemSource):
        """Open the table (RacError: it cannot be opened, or is empty)."""
        label = "problem file" if source.is_file else "problem dataset"
        self.name = source.source if source.is_file else f"{source.source} [{source.split}]"
        self._table = open_table(
            source.source, label=label, config=source.config, split=source.split
        )
        if not len(self._table):
            raise RacError(f"{self.name} holds no problems; name a source that does")
        self.columns = self._table.column_names

    def shuffled(self, columns: Sequence[str], seed: int) -> Iterator[TableRow]:
        """Return the rows in the seed's order (RacError: the table lacks a column)."""
        for name in columns:
            if name not in self.columns:
                raise RacError(f"{self.name} has no column {name!r}, but {', '.join(self.columns)}")
        rows = self._table.select_columns(list(columns))
        order = list(range(len(rows)))
        random.Random(f"{seed}").shuffle(order)
        return (TableRow(i, f"{self.name}, row {i}", rows[i]) for i in order)


def _is_broken(text: str) -> bool:
    """Tell whether a text has lone surrogates, which no tokenizer and no file takes."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _hash_int(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


# By suffix: the loader of `datasets`, its options, and the content that it expects.
_LOADERS: dict[str, tuple[str, dict[str, Any], str]] = {
    ".jsonl": ("json", {"parse_agent_traces": False}, "one JSON object per line"),
    ".json": ("json", {"parse_agent_traces": False}, "a list of objects in JSON"),
    ".parquet": ("parquet", {}, "Parquet"),
    ".txt": ("text", {"sample_by": "document"}, "text in UTF-8"),
}


def open_table(
    source: str, *, label: str, config: str | None = None, split: str = "train"
) -> "Dataset":
    """Open a .jsonl, .json, .parquet or .txt file, or a Hugging Face dataset; rows stay on disk."""
    with _opened(source, label, config, split, streaming=False) as table:
        return table


def stream_rows(
    source: str, *, label: str, config: str | None = None, split: str = "train"
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a source, read (and downloaded) only as far as the iterator advances."""
    with _opened(source, label, config, split, streaming=True) as rows:
        yield from rows


@contextmanager
def _opened(
    source: str, label: str, config: str | None, split: str, *, streaming: bool
) -> Iterator[Any]:
    """Open a table; errors of `datasets` depend on format, hub and network, and name the source."""
    path = Path(source).expanduser()
    is_file = path.suffix in _LOADERS  # else the id of a dataset
    if is_file:
        if not path.exists():
            raise RacError(f"{label} {source!r}: no such file (paths are relative to {Path.cwd()})")
        if regular_file(path, label).stat().st_size == 0:
            raise RacError(f"{label} {source!r} is empty; name another file")
    try:
        import datasets  # takes half a second, and most runs read neither file nor dataset

        if is_file:
            loader, options, _ = _LOADERS[path.suffix]
            options = {**options, "data_files": glob.escape(str(path.absolute()))}  # no pattern
            yield datasets.load_dataset(loader, split="train", streaming=streaming, **options)
        else:
            yield datasets.load_dataset(source, config, split=split, streaming=streaming)
    except Exception as error:
        cause = error.__cause__ or error
        words = " ".join(f"{type(cause).__name__}: {cause}".split())[:500]
        if not is_file:
            raise RacError(
                f"{label} {source!r} (config {config!r}, split {split!r}) could not be loaded "
                f"({words}); check the name, the split and the config, or name a local file or "
                "a built-in source, none of which needs a download"
            ) from error
        raise RacError(
            f"{label} {source!r} could not be read ({words}); it must hold "
            f"{_LOADERS[path.suffix][2]}: repair the file or name another"
        ) from error
