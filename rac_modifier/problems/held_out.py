"""Problems for evaluation: held out of calibration, or a published benchmark."""

import random
import re
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from rac_modifier.errors import RacError
from rac_modifier.problems.arithmetic import generate_distinct
from rac_modifier.problems.source import Problem, ProblemTable, TableRow, load_problems
from rac_modifier.settings.check import check_settings
from rac_modifier.settings.problems import ARITHMETIC, ProblemSource

LETTERS = "ABCDEFGH"
_CHOICES_SEED = "choices/0"  # fixed: all runs show a question's choices in the same order
_LAST_LINE = re.compile(r"(?<!#)####(?!#)([^\n]*)\s*\Z")
_MARKUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|boxed)\s*\{(.*)\}", re.DOTALL)
_ANOTHER = r"\s*(?:(?i:or|and)\b|[,/])\s*\(?[A-Za-z]\b"  # names a second letter: (C) or (A)
_LETTER = re.compile(rf"\(?([A-Za-z])(?:\)?\s*[.:)]?|\)?\s*[.:)](?!{_ANOTHER})\s.*)", re.DOTALL)


def held_out_problems(
    source: str, count: int, seed: int = 0, **fields: str | None
) -> list[Problem]:
    """Return `count` problems: a generator's own for tests, or the first of a file or dataset.

    Calibration never samples a generator's test problems. `fields`: of `ProblemSource`, by name.
    """
    checked = check_settings(ProblemSource, {"source": source, **fields}, "problems")
    if source == ARITHMETIC:
        problems = [
            Problem(f"{s.task}:{','.join(map(str, s.operands))}", s.question, s.answer, s.task)
            for s in islice(generate_distinct(seed, "test"), count)
        ]
    else:
        problems = list(islice(load_problems(checked, seed, held_out=True), count))
    _check_count(problems, count, source)
    return problems


def _check_count(problems: list[Problem], count: int, source: str) -> None:
    if len(problems) < count:
        raise RacError(f"{source} gave {len(problems)} of {count} problems; ask for fewer")


_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Preset:
    """A benchmark: a dataset on the Hugging Face hub, and how it is asked.

    The answer column holds the "whole" answer, a solution whose "last line" is "####
    answer", or the right one of the "choices": then the answer is its letter, and
    `wrong_columns` hold the others.
    """

    name: str
    column: str = "problem"
    answer_column: str = "answer"
    instruction: str = _BOXED
    answers: Literal["whole", "last line", "choices"] = "whole"
    wrong_columns: tuple[str, ...] = ()
    source: str = ""
    config: str | None = None
    split: str = "test"
    problems: int = 30  # as published
    samples: int = 64  # answers per problem
    temperature: float = 0.6
    top_p: float = 0.95
    cap: int = 32768  # new tokens
    access: str = ""  # what a user must do before the dataset can be read

    @property
    def published(self) -> dict[str, Any]:
        """Return the published values, by option of `rac eval`."""
        names = ("source", "samples", "cap", "temperature", "top_p", "problems")
        return {name: getattr(self, name) for name in ("column", "answer_column", *names)}


# The protocol by which reasoning models are compared:
# - temperature 0.6, top-p 0.95, at most 32,768 new tokens: DeepSeek-R1 (arXiv 2501.12948,
#   section 3), and open-r1's commands.
# - answers per problem: open-r1's README (AIME 2024 64, MATH-500 4, GPQA Diamond 8). It has no
#   figure for AIME 2025, which gets 64, and for GSM8K, which gets 1.
# - the instruction: DeepSeek-R1's README, in the user's turn. For GPQA the letter is asked for in
#   the same box, where open-r1 has a last line "Answer: LETTER".
# - data sets: those that lighteval reads.
_BOXED_LETTER = (
    "Please reason step by step, and put the letter of the right choice, and nothing else, "
    "within \\boxed{}."
)
_ALL = (
    Preset("aime24", source="HuggingFaceH4/aime_2024", split="train"),
    Preset("aime25", source="yentinglin/aime_2025", split="train"),
    Preset(
        "gpqa-diamond",
        column="Question",
        answer_column="Correct Answer",
        instruction=_BOXED_LETTER,
        answers="choices",
        wrong_columns=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        source="Idavidrein/gpqa",
        config="gpqa_diamond",
        split="train",
        problems=198,
        samples=8,
        access="its owners ask to accept their terms on its page, then: hf auth login",
    ),
    Preset(
        "gsm8k",
        column="question",
        answers="last line",
        source="openai/gsm8k",
        config="main",
        problems=1319,
        samples=1,
    ),
    Preset("math-500", source="HuggingFaceH4/MATH-500", problems=500, samples=4),
)
PRESETS = {preset.name: preset for preset in _ALL}


def benchmark_problems(
    source: ProblemSource, preset: Preset, seed: int, count: int
) -> list[Problem]:
    """Return `count` problems of a preset's columns; those that `source` names come first."""
    column = source.column or preset.column
    answer_column = source.answer_column or preset.answer_column
    table = ProblemTable(source)
    rows = table.shuffled([column, answer_column, *preset.wrong_columns], seed)
    problems = []
    for row in islice(rows, count):
        question, answer = row.question(column), _filled(row, answer_column)
        if preset.answers == "last line":
            last = _LAST_LINE.search(answer)
            if last is None or not last[1].strip():
                raise RacError(
                    f"{row.where}: column {answer_column!r} must end in a line '#### answer', "
                    f"it ends in {answer[-40:]!r}"
                )
            answer = last[1].strip().replace(",", "")  # thousands
        elif preset.answers == "choices":
            choices = [answer, *(_filled(row, name) for name in preset.wrong_columns)]
            question, answer = _with_choices(question, choices)
        text = f"{question.strip()}\n\n{preset.instruction}"
        problems.append(row.problem(text, answer, preset.name))
    _check_count(problems, count, table.name)
    return problems


def _filled(row: TableRow, column: str) -> str:
    text = (row.answer(column) or "").strip()
    if not text:
        raise RacError(f"{row.where}: column {column!r} is empty; complete the row, or remove it")
    return text


def _with_choices(question: str, choices: list[str]) -> tuple[str, str]:
    """Return a question with its choices, shuffled by it alone, and the letter of `choices[0]`."""
    order = list(range(len(choices)))
    random.Random(f"{_CHOICES_SEED}/{question}").shuffle(order)
    lines = [f"{letter}) {choices[i]}" for letter, i in zip(LETTERS, order, strict=False)]
    return "\n".join([question.strip(), "", *lines]), LETTERS[order.index(0)]


def same_letter(answer: str, reference: str) -> bool:
    r"""Tell whether an answer names the reference's letter; the text of a choice alone is wrong.

    Two letters are wrong too.

    >>> same_letter(r"\text{(C)}", "C"), same_letter("C. 12 nm", "C"), same_letter("Carbon", "C")
    (True, True, False)
    """
    bare = answer.strip().strip("$").strip()
    while wrapped := _MARKUP.fullmatch(bare):
        bare = wrapped[1].strip()
    letter = _LETTER.fullmatch(bare)
    return letter is not None and letter[1].upper() == reference
