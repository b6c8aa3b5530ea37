"""Rows in the published layouts become problems; what is wrong with a row is named."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from rac_modifier.errors import RacError
from rac_modifier.problems.answers import is_correct
from rac_modifier.problems.benchmarks import Layout, benchmark_problems, same_letter, with_choices
from rac_modifier.settings.problems import ProblemSource

PLAIN = Layout("plain", "problem", "answer", "Use a box.")
SOLUTION = Layout("solution", "question", "answer", "Use a box.", "last line")
WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
CHOICES = Layout("choices", "Question", "Correct Answer", "Use a box.", "choices", WRONG)


def gpqa_row(number, **changes):
    """As in the published file, which has many more columns and line ends around its texts."""
    row = {
        "Question": f"Which of these is {number}?\n",
        "Correct Answer": f" {number}\n",
        "Record ID": "rec",
    }
    return {**row, **{name: f"{number + i}" for i, name in enumerate(WRONG, 1)}, **changes}


def read(tmp_path, layout, rows, seed=0, count=None, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return benchmark_problems(ProblemSource(source=str(path), **fields), layout, seed, count)


def test_a_question_gets_its_instruction_and_the_seed_decides_the_order(tmp_path):
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1), "subject": "Algebra"} for i in range(20)]
    problems = read(tmp_path, PLAIN, rows)
    assert {(p.question, p.answer, p.task) for p in problems} == {
        (f"{i} + 1?\n\nUse a box.", str(i + 1), "plain") for i in range(20)
    }
    other = read(tmp_path, PLAIN, rows, seed=1)
    assert other != problems
    assert sorted(p.id for p in other) == sorted(p.id for p in problems)
    assert read(tmp_path, PLAIN, rows, count=5) == problems[:5]


def test_another_instruction_is_another_problem(tmp_path):
    rows = [{"problem": "1 + 1?", "answer": "2"}]
    (one,) = read(tmp_path, PLAIN, rows)
    (other,) = read(tmp_path, Layout("plain", "problem", "answer", "Use two boxes."), rows)
    assert one.id != other.id


def test_the_user_can_name_other_columns(tmp_path):
    rows = [{"q": "1 + 1?", "a": 2, "problem": "no", "answer": "no"}]
    (problem,) = read(tmp_path, PLAIN, rows, column="q", answer_column="a")
    assert (problem.question.partition("\n")[0], problem.answer) == ("1 + 1?", "2")


def test_parquet_with_integer_answers(tmp_path):
    path = tmp_path / "aime.parquet"
    Dataset.from_dict({"problem": ["x?", "y?"], "answer": [33, 204]}).to_parquet(path)
    found = benchmark_problems(ProblemSource(source=str(path)), PLAIN, 0)
    assert {p.answer for p in found} == {"33", "204"}
    (of_33,) = [p for p in found if p.answer == "33"]
    assert is_correct(r"</think>\boxed{033}", of_33.answer)


def test_the_reference_of_a_worked_solution_is_its_last_line(tmp_path):
    answers = {
        "a": "3 * 4 = <<3*4=12>>12\n#### 12",
        "b": "so\n#### -1,200 \n",
        "c": "#### 0.5",
        "d": "#### 1\nno\n#### 2",
    }
    rows = [{"question": name, "answer": text} for name, text in answers.items()]
    found = {p.question[0]: p.answer for p in read(tmp_path, SOLUTION, rows)}
    assert found == {"a": "12", "b": "-1200", "c": "0.5", "d": "2"}


@pytest.mark.parametrize("answer", ["12", "#### 12\nand more", "####", "##### "])
def test_a_solution_without_a_last_line_is_refused(tmp_path, answer):
    with pytest.raises(
        RacError, match=r"row 0: column 'answer' must end in a line '#### answer', it ends in"
    ):
        read(tmp_path, SOLUTION, [{"question": "q", "answer": answer}])


def test_choices_are_lettered_in_an_order_of_the_question_alone(tmp_path):
    rows = [gpqa_row(10 * i) for i in range(40)]
    problems = {p.question.partition("\n")[0]: p for p in read(tmp_path, CHOICES, rows)}
    again = {p.question.partition("\n")[0]: p for p in read(tmp_path, CHOICES, rows[::-1], seed=7)}
    letters = {p.answer for p in problems.values()}
    assert letters == {"A", "B", "C", "D"}  # the right one is anywhere
    for i in range(40):
        question = f"Which of these is {10 * i}?"
        problem = problems[question]
        lines = problem.question.split("\n")
        assert lines[0] == question
        assert lines[-2:] == ["", "Use a box."]
        assert sorted(line[3:] for line in lines[2:6]) == sorted(str(10 * i + k) for k in range(4))
        assert [line[:3] for line in lines[2:6]] == ["A) ", "B) ", "C) ", "D) "]
        assert f"{problem.answer}) {10 * i}" in lines
        assert (again[question].question, again[question].answer) == (
            problem.question,
            problem.answer,
        )


def test_the_order_of_choices_stays_from_version_to_version():
    question, letter = with_choices("What is 2 + 2?", ["4", "3", "5", "22"])
    assert (question, letter) == ("What is 2 + 2?\n\nA) 4\nB) 5\nC) 3\nD) 22", "A")


def test_text_of_a_row_is_never_a_template(tmp_path):
    hostile = r"{question} {0} %s \boxed{A} </think> ${HOME} #### 7"
    (problem,) = read(tmp_path, CHOICES, [gpqa_row(1, Question=hostile)])
    assert problem.question.startswith(hostile + "\n\nA) ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"Correct Answer": None},
            "row 0: column 'Correct Answer' holds nothing; complete the row",
        ),
        ({"Incorrect Answer 2": "  "}, "row 0: column 'Incorrect Answer 2' holds nothing"),
        (
            {"Question": None},
            "row 0: column 'Question' must hold the question as text, it holds nothing",
        ),
        (
            {"Question": 5},
            "row 0: column 'Question' must hold the question as text, it holds int '5'",
        ),
        (
            {"Correct Answer": ["4"]},
            "row 0: column 'Correct Answer' must hold text or a number, it holds a list",
        ),
    ],
)
def test_a_row_that_lacks_something_is_named(tmp_path, changes, message):
    with pytest.raises(RacError, match=message):
        read(tmp_path, CHOICES, [gpqa_row(1, **changes)])


@pytest.mark.parametrize("column", ["Question", "Correct Answer", *WRONG])
def test_a_column_that_is_missing_is_named_with_those_that_are_there(tmp_path, column):
    row = gpqa_row(1)
    del row[column]
    with pytest.raises(RacError, match=f"has no column '{column}'; its columns are: .*Record ID"):
        read(tmp_path, CHOICES, [row])


def test_too_few_rows(tmp_path):
    rows = [{"problem": "1 + 1?", "answer": "2"}]
    with pytest.raises(RacError, match="gave 1 problems of the 2 asked for"):
        read(tmp_path, PLAIN, rows, count=2)
    with pytest.raises(RacError, match="holds no problems; name a source that does"):
        read(tmp_path, PLAIN, [])


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("C", True),
        ("c", True),
        (" C ", True),
        ("(C)", True),
        ("C)", True),
        ("C.", True),
        ("$C$", True),
        (r"\text{C}", True),
        (r"\textbf{(C)}", True),
        (r"\mathrm{\text{C}}", True),
        ("C) 12 nm", True),
        ("(C) 12 nm", True),
        ("C: 12 nm", True),
        ("D", False),
        ("A, C", False),
        ("A or C", False),
        ("C or A", False),
        ("Carbon", False),
        ("12 nm", False),
        ("CC", False),
        ("", False),
        ("()", False),
    ],
)
def test_letters(answer, right):
    assert same_letter(answer, "C") is right


def test_a_letter_is_read_from_the_box_after_the_thinking():
    text = r"\boxed{A}? no.</think>The answer is \boxed{\text{C}}."
    assert is_correct(text, "C", same_letter)
    assert not is_correct(text, "A", same_letter)
