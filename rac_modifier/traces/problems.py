"""Where the questions come from: built-in arithmetic, reasoning-gym, a file, or a Hugging Face dataset."""

from __future__ import annotations

import difflib
import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rac_modifier.errors import RacError
from rac_modifier.reasoner import tasks
from rac_modifier.traces.tables import FILE_SUFFIXES, Table, open_dataset, open_file

ARITHMETIC = "arithmetic"
GYM_PREFIX = "reasoning-gym:"
QUESTION_COLUMNS = ("problem", "question", "prompt")
# What to set for the data sets of the paper, where a user sets nothing.
PRESETS: dict[str, dict[str, str]] = {
    "open-r1/OpenR1-Math-220k": {"column": "problem", "answer_column": "answer"},
    # Its default configuration has no column that asks the whole question; it has no answers, only tests.
    "open-r1/codeforces": {"config": "verifiable-prompts", "column": "prompt"},
}
_GYM_CHUNK = 500
_REPEATS_BEFORE_EXHAUSTED = 10_000


class ProblemSource(BaseModel):
    """Which problems to put to the model.

    `source` is "arithmetic" (the calibration split of the built-in tasks, no download), "reasoning-gym:chain_sum" or
    "reasoning-gym:chain_sum,gcd" (generated, tasks in turn), a path that ends in .jsonl, .json or .parquet, or else the
    id of a Hugging Face dataset. The generators never end; the others are finite and shuffled by the seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        default=ARITHMETIC, min_length=1, description="arithmetic, reasoning-gym:<task>, a file, or a dataset id"
    )
    column: str | None = Field(
        default=None, description="column of the question; needed unless one of problem/question/prompt"
    )
    answer_column: str | None = Field(default=None, description="column of the answer, kept for review")
    split: str = Field(default="train", description="split of a Hugging Face dataset")
    config: str | None = Field(default=None, description="configuration of a Hugging Face dataset")
    limit: int | None = Field(default=None, ge=1, description="use at most this many problems")
    max_prompt_tokens: int | None = Field(
        default=None, ge=1, description="pass over problems whose prompt is longer, and note them; none is ever cut"
    )

    @property
    def is_generator(self) -> bool:
        """Whether the problems are generated, without end, rather than read from a table."""
        return self.source == ARITHMETIC or self.source.startswith(GYM_PREFIX)

    @property
    def is_file(self) -> bool:
        """Whether `source` is a path to a file of problems."""
        return not self.is_generator and self.source.endswith(FILE_SUFFIXES)

    @classmethod
    def looks_like(cls, name: str) -> bool:
        """Whether a name by itself is a source of problems, rather than a name that somebody gave to one."""
        one = cls(source=name)
        return one.is_generator or one.is_file or "/" in name

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, values: Any) -> Any:
        if isinstance(values, dict) and (preset := PRESETS.get(str(values.get("source")))):
            given = {name: value for name, value in values.items() if value is not None}
            if preset.keys() & {"config"} and given.get("config", preset["config"]) != preset["config"]:
                return values  # another configuration has other columns
            return {**values, **preset, **given}
        return values

    @model_validator(mode="after")
    def _only_settings_that_apply(self) -> ProblemSource:
        given = {"column": self.column, "answer_column": self.answer_column, "config": self.config}
        given["split"] = self.split if self.split != "train" else None
        applicable = () if self.is_generator else ("column", "answer_column") if self.is_file else tuple(given)
        for name, value in given.items():
            if value is not None and name not in applicable:
                kind = "generates its problems" if self.is_generator else "is a file"
                raise RacError(f"{name}={value!r} does not apply: source {self.source!r} {kind}; leave {name} out")
        return self


@dataclass(frozen=True)
class Problem:
    """One question; `id` depends on the problem alone, so that it stays the same when a limit changes."""

    id: str
    question: str
    answer: str | None
    task: str | None


def load_problems(source: ProblemSource, seed: int) -> Iterator[Problem]:
    """The problems of a source in the order of the seed; endless for generators without a limit.

    The source is opened and its columns are checked at once; rows are read as the iterator advances.

    Raises:
        RacError: a missing or malformed file, an unknown dataset, task or column, an empty set; while iterating, a
            question that is no text.
    """
    if source.source == ARITHMETIC:
        problems = _arithmetic(seed)
    elif source.source.startswith(GYM_PREFIX):
        problems = _reasoning_gym(source.source.removeprefix(GYM_PREFIX), seed)
    else:
        table = (
            open_file(Path(source.source).expanduser())
            if source.is_file
            else open_dataset(source.source, source.config, source.split)
        )
        problems = _from_table(table, source, seed)
    return islice(problems, source.limit)


def _arithmetic(seed: int) -> Iterator[Problem]:
    seen: set[str] = set()
    repeats = 0
    for solved in tasks.generate(seed, "calibration"):
        # The same operands in another phrasing are the same problem: the operands are its identity.
        identity = f"{solved.task}:{','.join(str(x) for x in sorted(solved.operands))}"
        if identity in seen:
            repeats += 1
            if repeats > _REPEATS_BEFORE_EXHAUSTED:
                return
            continue
        repeats = 0
        seen.add(identity)
        yield Problem(identity, solved.question, solved.answer, solved.task)


def _reasoning_gym(names: str, seed: int) -> Iterator[Problem]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise RacError(
            f"problem source {GYM_PREFIX + names!r} needs `pip install 'rac-modifier[reasoning-gym]'`"
        ) from error
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in DATASETS:
            close = difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)[:5]
            raise RacError(f"unknown reasoning-gym task {name!r}; did you mean {', '.join(close)}?")

    def one_task(name: str) -> Iterator[Problem]:
        # reasoning-gym seeds item i with seed + i, so neighbouring seeds share nearly all their items: each chunk gets
        # a hashed seed of its own instead.
        for chunk in count():
            items = reasoning_gym.create_dataset(name, seed=_gym_seed(name, seed, chunk), size=_GYM_CHUNK)
            for index in range(_GYM_CHUNK):
                item = items[index]
                yield Problem(f"{name}:{chunk * _GYM_CHUNK + index}", item["question"], str(item["answer"]), name)

    def in_turn() -> Iterator[Problem]:
        streams = [one_task(name) for name in chosen]
        while True:
            for stream in streams:
                yield next(stream)

    return in_turn()


def _gym_seed(name: str, seed: int, chunk: int) -> int:
    return _hash_int(f"{seed}/{name}/{chunk}") % 2**31


def gym_item(source: ProblemSource, seed: int, problem_id: str) -> tuple[str, int, int, int] | None:
    """Task, seed, size and index of the reasoning-gym data set that a problem is from; None if it is from elsewhere."""
    if not source.source.startswith(GYM_PREFIX):
        return None
    name, _, number = problem_id.rpartition(":")
    chunk, index = divmod(int(number), _GYM_CHUNK)
    return name, _gym_seed(name, seed, chunk), _GYM_CHUNK, index


def _from_table(table: Table, source: ProblemSource, seed: int) -> Iterator[Problem]:
    column = source.column or _guess_column(table)
    wanted = [column] if source.answer_column is None else [column, source.answer_column]
    for name in wanted:
        if name not in table.columns:
            raise RacError(
                f"{table.where} has no column {name!r}; its columns are: {', '.join(table.columns) or 'none'}"
            )
    rows = table.read(wanted)
    order = list(range(len(rows)))
    if not order:
        raise RacError(f"{table.where} holds no problems; name a source that does")
    random.Random(f"{seed}").shuffle(order)
    return (_from_row(rows[i], f"{table.where}, row {i}", i, column, source.answer_column) for i in order)


def _guess_column(table: Table) -> str:
    found = [name for name in QUESTION_COLUMNS if name in table.columns]
    if not table.columns:
        raise RacError(f"{table.where} holds no problems; name a source that does")
    if len(found) != 1:
        raise RacError(
            f"{table.where}: which column holds the question? Set `column` to one of: {', '.join(table.columns)}"
        )
    return found[0]


def _from_row(row: Mapping[str, Any], where: str, index: int, column: str, answer_column: str | None) -> Problem:
    question = row.get(column)
    if not isinstance(question, str) or not question.strip():
        what = f"{type(question).__name__} {str(question)[:80]!r}" if question is not None else "nothing"
        raise RacError(
            f"{where}: column {column!r} must hold the question as text, it holds {what}; choose another column"
        )
    answer = row.get(answer_column) if answer_column is not None else None
    if answer is not None and not isinstance(answer, (str, int, float)):
        raise RacError(
            f"{where}: column {answer_column!r} must hold text or a number, it holds a {type(answer).__name__}; "
            "choose another answer_column"
        )
    # The hash makes an edited file a set of other problems, so that a resumed run does not take its rows for done.
    identity = f"row{index}-{_hash_int(question) % 16**8:08x}"
    return Problem(identity, question, None if answer is None else str(answer), None)


def _hash_int(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
