"""Problems for evaluation: held out of calibration, or a published benchmark."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from rac_modifier.errors import RacError
from rac_modifier.problems.arithmetic import generate_distinct
from rac_modifier.problems.source import Problem, ProblemTable, TableRow, load_problems
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.problems import ARITHMETIC, ProblemSource

LETTERS = "ABCDEFGH"
_CHOICES_SEED = "choices/0"  # fixed: all runs show a question's choices in the same order
_LAST_LINE = re.compile(r"(?<!#)####(?!#)([^\n]*)\s*\Z")
_MARKUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|boxed)\s*\{(.*)\}", re.DOTALL)
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)?\s*[.:)]?|\)?\s*[.:)]\s.*)", re.DOTALL)


def held_out_problems(
    source: str, count: int, seed: int = 0, **fields: str | None
) -> list[Problem]:
    """Return `count` problems: the test split of "arithmetic", or the first of another source.

    Only "arithmetic" is disjoint from calibration by construction. With another source, calibrate
    on other problems. `fields` are others of `ProblemSource`: column, answer_column, split.
    """
    checked = check_settings(ProblemSource, {"source": source, **fields}, "problems")
    if source == ARITHMETIC:
        problems = [
            Problem(f"{s.task}:{','.join(map(str, s.operands))}", s.question, s.answer, s.task)
            for s in islice(generate_distinct(seed, "test"), count)
        ]
    else:
        problems = list(islice(load_problems(checked, seed), count))
    _check_count(problems, count, source)
    return problems


def _check_count(problems: list[Problem], count: int, source: str) -> None:
    if len(problems) < count:
        raise RacError(
            f"{source} gave {len(problems)} problems of the {count} asked for; ask for fewer"
        )


@dataclass(frozen=True)
class Layout:
    """The columns and the instruction that make a benchmark's rows problems.

    The answer column holds the "whole" answer, a solution whose "last line" is "####
    answer", or the right one of the "choices": then the answer is its letter, and
    `wrong_columns` hold the others.
    """

    task: str
    column: str
    answer_column: str
    instruction: str
    answers: Literal["whole", "last line", "choices"] = "whole"
    wrong_columns: tuple[str, ...] = ()


def benchmark_problems(
    source: ProblemSource, layout: Layout, seed: int, count: int
) -> list[Problem]:
    """Return `count` problems of a benchmark, or of a file with its columns.

    The seed decides their order. The source's `column` and `answer_column`, if set, replace the
    layout's.
    """
    layout = replace(
        layout,
        column=source.column or layout.column,
        answer_column=source.answer_column or layout.answer_column,
    )
    table = ProblemTable(source)
    rows = table.shuffled([layout.column, layout.answer_column, *layout.wrong_columns], seed)
    problems = [_problem(row, layout) for row in islice(rows, count)]
    _check_count(problems, count, table.name)
    return problems


def _problem(row: TableRow, layout: Layout) -> Problem:
    question = row.question(layout.column)
    answer = _filled(row, layout.answer_column)
    if layout.answers == "last line":
        last = _LAST_LINE.search(answer)
        if last is None or not last[1].strip():
            raise RacError(
                f"{row.where}: column {layout.answer_column!r} must end in a line '#### answer', "
                f"it ends in {answer[-40:]!r}"
            )
        answer = last[1].strip().replace(",", "")  # thousands
    elif layout.answers == "choices":
        choices = [answer, *(_filled(row, name) for name in layout.wrong_columns)]
        question, answer = with_choices(question, choices)
    return row.problem(f"{question.strip()}\n\n{layout.instruction}", answer, layout.task)


def _filled(row: TableRow, column: str) -> str:
    text = (row.answer(column) or "").strip()
    if not text:
        raise RacError(
            f"{row.where}: column {column!r} holds nothing; complete the row, or remove it"
        )
    return text


def with_choices(question: str, choices: list[str]) -> tuple[str, str]:
    """Return a question with its lettered choices, and the letter of `choices[0]`, the right one.

    The order depends on the question alone.
    """
    order = list(range(len(choices)))
    random.Random(f"{_CHOICES_SEED}/{question}").shuffle(order)
    lines = [f"{letter}) {choices[i]}" for letter, i in zip(LETTERS, order, strict=False)]
    return "\n".join([question.strip(), "", *lines]), LETTERS[order.index(0)]


def same_letter(answer: str, reference: str) -> bool:
    r"""Tell whether an answer names the reference's letter; the text of a choice alone is wrong.

    >>> same_letter(r"\text{(C)}", "C"), same_letter("C. 12 nm", "C"), same_letter("Carbon", "C")
    (True, True, False)
    """
    bare = answer.strip().strip("$").strip()
    while wrapped := _MARKUP.fullmatch(bare):
        bare = wrapped[1].strip()
    letter = _LETTER.fullmatch(bare)
    return letter is not None and letter[1].upper() == reference
