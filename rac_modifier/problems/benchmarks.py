"""Published benchmarks as problems: their columns, the instruction that is added to a question, and multiple choice."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from rac_modifier.errors import RacError
from rac_modifier.problems.answers import Verifier
from rac_modifier.problems.source import (
    Problem,
    answer_in,
    open_problem_table,
    question_in,
    row_id,
    shuffled_rows,
    table_name,
)
from rac_modifier.settings.problems import ProblemSource

LETTERS = "ABCDEFGH"
_CHOICES_SEED = "choices/0"  # fixed: all runs show a question's choices in the same order
_LAST_LINE = re.compile(r"(?<!#)####(?!#)([^\n]*)\s*\Z")
_MARKUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|boxed)\s*\{(.*)\}", re.DOTALL)
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)?\s*[.:)]?|\)?\s*[.:)]\s.*)", re.DOTALL)

Answers = Literal["whole", "last line", "choices"]


@dataclass(frozen=True)
class Layout:
    """How a benchmark's rows become problems.

    Attributes:
        task: of its problems, by which results and answer checks know them.
        column: of the question.
        answer_column: of the right answer.
        instruction: added to each question, after an empty line.
        answers: "whole": the column holds the answer; "last line": it holds a solution that ends in "#### answer"; "choices":
            the right choice, of which the answer is the letter.
        wrong_columns: of the wrong choices.
    """

    task: str
    column: str
    answer_column: str
    instruction: str
    answers: Answers = "whole"
    wrong_columns: tuple[str, ...] = ()


def benchmark_problems(
    source: ProblemSource, layout: Layout, seed: int, count: int | None = None
) -> list[Problem]:
    """The problems of a benchmark, or of a file with its columns, in an order that the seed decides.

    Args:
        source: a dataset or a file; its `column` and `answer_column`, where set, replace those of the layout.
        layout: of the benchmark.
        seed: of the order. The order of the choices of a question is always the same.
        count: how many; None: all.

    Raises:
        RacError: what cannot be loaded, a column that is missing, a row without a question, an answer or a choice, or fewer rows
            than `count`.
    """
    column, answer_column = (
        source.column or layout.column,
        source.answer_column or layout.answer_column,
    )
    table = open_problem_table(source)
    rows = shuffled_rows(table, source, (column, answer_column, *layout.wrong_columns), seed)
    problems = [
        _problem(row, where, i, layout, question_in(row, where, column), answer_column)
        for i, where, row in islice(rows, count)
    ]
    if not problems or (count is not None and len(problems) < count):
        asked = "" if count is None else f" of the {count} asked for"
        raise RacError(
            f"{table_name(source)} gave {len(problems)} problems{asked}; ask for fewer, or name another source"
        )
    return problems


def _problem(
    row: Mapping[str, Any],
    where: str,
    index: int,
    layout: Layout,
    question: str,
    answer_column: str,
) -> Problem:
    answer = _filled(row, where, answer_column)
    if layout.answers == "last line":
        answer = _last_line(answer, where, answer_column)
    elif layout.answers == "choices":
        choices = [answer, *(_filled(row, where, name) for name in layout.wrong_columns)]
        question, answer = with_choices(question, choices)
    question = f"{question.strip()}\n\n{layout.instruction}"
    return Problem(row_id(index, question), question, answer, layout.task)


def _filled(row: Mapping[str, Any], where: str, column: str) -> str:
    text = (answer_in(row, where, column) or "").strip()
    if not text:
        raise RacError(f"{where}: column {column!r} holds nothing; complete the row, or remove it")
    return text


def _last_line(solution: str, where: str, column: str) -> str:
    last = _LAST_LINE.search(solution)
    answer = last[1].strip() if last else ""
    if not answer:
        raise RacError(
            f"{where}: column {column!r} must end in a line '#### answer', it ends in {solution[-40:]!r}"
        )
    return answer.replace(",", "")  # thousands


def with_choices(question: str, choices: list[str]) -> tuple[str, str]:
    """A question followed by its lettered choices, and the letter of the first one given, which is the right one.

    The order depends on the question alone.
    """
    order = list(range(len(choices)))
    random.Random(f"{_CHOICES_SEED}/{question}").shuffle(order)
    lines = [f"{letter}) {choices[i]}" for letter, i in zip(LETTERS, order, strict=False)]
    return "\n".join([question.strip(), "", *lines]), LETTERS[order.index(0)]


def same_letter(answer: str, reference: str) -> bool:
    r"""Whether an answer names the reference's letter: `C`, `(c)`, `C) 5 m`, `\text{C}`; a choice's text alone is wrong.

    >>> same_letter(r"\text{(C)}", "C"), same_letter("C. 12 nm", "C"), same_letter("Carbon", "C")
    (True, True, False)
    """
    bare = answer.strip().strip("$").strip()
    while wrapped := _MARKUP.fullmatch(bare):
        bare = wrapped[1].strip()
    letter = _LETTER.fullmatch(bare)
    return letter is not None and letter[1].upper() == reference


def verifiers_of(layout: Layout) -> dict[str, Verifier]:
    """By task, what replaces the mathematical comparison of answers to these problems."""
    return {layout.task: same_letter} if layout.answers == "choices" else {}
