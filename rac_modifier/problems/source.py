"""Where questions come from: arithmetic, reasoning-gym, a file, or a hub dataset."""

from __future__ import annotations

import difflib
import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any

from rac_modifier.errors import RacError
from rac_modifier.problems.arithmetic import generate_distinct
from rac_modifier.problems.tables import open_table
from rac_modifier.settings.problems import ARITHMETIC, GYM_PREFIX, ProblemSource

if TYPE_CHECKING:
    from datasets import Dataset

QUESTION_COLUMNS = ("problem", "question", "prompt")
_GYM_CHUNK = 500
_EXACT_FLOATS = 2.0**53  # integers below are exact in the float64 that larger JSON integers become


@dataclass(frozen=True)
class Problem:
    """A question; `id` depends on the problem alone, so it stays the same when a limit changes."""

    id: str
    question: str
    answer: str | None
    task: str | None


def load_problems(source: ProblemSource, seed: int) -> Iterator[Problem]:
    """Return the problems of a source in an order that the seed decides.

    Generators without a limit never end. The source is opened and its columns are checked first;
    rows are read as the iterator advances.

    Raises:
        RacError: a missing or malformed file, an unknown dataset, task or column, an empty table;
            while iterating, a question that is not text, or an answer that is neither text nor a
            number.
    """
    problems: Iterator[Problem]
    if source.source == ARITHMETIC:
        solved = generate_distinct(seed, "calibration")
        problems = (Problem(s.identity, s.question, s.answer, s.task) for s in solved)
    elif source.source.startswith(GYM_PREFIX):
        problems = _reasoning_gym(source.source.removeprefix(GYM_PREFIX), seed)
    else:
        problems = _from_table(open_problem_table(source), source, seed)
    return islice(problems, source.limit)


def _reasoning_gym(names: str, seed: int) -> Iterator[Problem]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise RacError(
            f"problem source {GYM_PREFIX + names!r} needs `pip install "
            "'rac-modifier[reasoning-gym]'`"
        ) from error
    tasks = [name.strip() for name in names.split(",")]
    for name in tasks:
        if name not in DATASETS:
            close = difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)[:5]
            raise RacError(f"unknown reasoning-gym task {name!r}; did you mean {', '.join(close)}?")

    def of_task(name: str) -> Iterator[Problem]:
        # reasoning-gym seeds item i with seed + i: neighbouring seeds would share nearly all items.
        for chunk in count():
            chunk_seed = _gym_seed(name, seed, chunk)
            items = reasoning_gym.create_dataset(name, seed=chunk_seed, size=_GYM_CHUNK)
            for index in range(_GYM_CHUNK):
                item, number = items[index], chunk * _GYM_CHUNK + index
                yield Problem(f"{name}:{number}", item["question"], str(item["answer"]), name)

    def in_turn() -> Iterator[Problem]:
        streams = [of_task(name) for name in tasks]
        while True:
            yield from map(next, streams)

    return in_turn()


def _gym_seed(name: str, seed: int, chunk: int) -> int:
    return _hash_int(f"{seed}/{name}/{chunk}") % 2**31


def gym_item(source: ProblemSource, seed: int, problem_id: str) -> tuple[str, int, int, int] | None:
    """Return task, seed, size and index in reasoning-gym of a problem; None for other sources."""
    if not source.source.startswith(GYM_PREFIX):
        return None
    name, _, number = problem_id.rpartition(":")
    chunk, index = divmod(int(number), _GYM_CHUNK)
    return name, _gym_seed(name, seed, chunk), _GYM_CHUNK, index


def _from_table(table: Dataset, source: ProblemSource, seed: int) -> Iterator[Problem]:
    column, answer_column = source.column, source.answer_column
    if column is None:
        candidates = [name for name in QUESTION_COLUMNS if name in table.column_names]
        if len(candidates) != 1:
            raise RacError(
                f"{table_name(source)}: which column holds the question? Set `column` to one of: "
                f"{', '.join(table.column_names)}"
            )
        column = candidates[0]

    def problem(index: int, where: str, row: Mapping[str, Any]) -> Problem:
        question = question_in(row, where, column)
        answer = None if answer_column is None else answer_in(row, where, answer_column)
        return Problem(row_id(index, question), question, answer, None)

    columns = (column,) if answer_column is None else (column, answer_column)
    return (problem(*row) for row in shuffled_rows(table, source, columns, seed))


def open_problem_table(source: ProblemSource) -> Dataset:
    """Open the table of a source that is a file or a dataset."""
    label = "problem file" if source.is_file else "problem dataset"
    table = open_table(source.source, label=label, config=source.config, split=source.split)
    if not len(table):
        raise RacError(f"{table_name(source)} holds no problems; name a source that does")
    return table


def table_name(source: ProblemSource) -> str:
    """Name a file or dataset in messages."""
    return source.source if source.is_file else f"{source.source} [{source.split}]"


def shuffled_rows(
    table: Dataset, source: ProblemSource, columns: tuple[str, ...], seed: int
) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Return number, name for messages and values of each row, in the seed's order."""
    where = table_name(source)
    for name in columns:
        if name not in table.column_names:
            raise RacError(
                f"{where} has no column {name!r}; its columns are: {', '.join(table.column_names)}"
            )
    rows = table.select_columns(list(columns))
    order = list(range(len(rows)))
    random.Random(f"{seed}").shuffle(order)
    return ((i, f"{where}, row {i}", rows[i]) for i in order)


def question_in(row: Mapping[str, Any], where: str, column: str) -> str:
    """Return the question of a row; a row without text there is a RacError."""
    question = row[column]
    if not isinstance(question, str) or not question.strip():
        raise RacError(
            f"{where}: column {column!r} must hold the question as text, it holds "
            f"{repr(question)[:80]}; choose another column"
        )
    return question


def answer_in(row: Mapping[str, Any], where: str, column: str) -> str | None:
    """Return the answer of a row as text, None for null."""
    answer = row[column]
    if answer is not None and not isinstance(answer, (str, int, float)):
        raise RacError(
            f"{where}: column {column!r} must hold text or a number, it holds a "
            f"{type(answer).__name__}; write the answers as text in a Parquet file"
        )
    if isinstance(answer, float) and abs(answer) >= _EXACT_FLOATS:
        raise RacError(
            f"{where}: column {column!r} holds the number {answer!r}, some digits of which "
            "may have been lost when it was read; write the answers as text, in quotes"
        )
    return None if answer is None else str(answer)


def row_id(index: int, question: str) -> str:
    """Return the id of a row; its hash makes an edited row another problem for a resumed run."""
    return f"row{index}-{_hash_int(question) % 16**8:08x}"


def _hash_int(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
