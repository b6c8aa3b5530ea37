"""Problems held out of calibration; rows in published presets, and what is wrong with a row."""

import json
from dataclasses import replace
from itertools import islice

import pytest

from rac_modifier.errors import RacError
from rac_modifier.problems.answer_checker import check_answer
from rac_modifier.problems.answers import is_correct
from rac_modifier.problems.held_out import (
    Preset,
    _with_choices,
    benchmark_problems,
    held_out_problems,
    same_letter,
)
from rac_modifier.problems.source import gym_item, load_problems
from rac_modifier.settings.problems import ProblemSource

PLAIN = Preset("plain", "problem", "answer", "Use a box.")
SOLUTION = Preset("solution", "question", "answer", "Use a box.", "last line")
WRONG = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
CHOICES = Preset("choices", "Question", "Correct Answer", "Use a box.", "choices", WRONG)


def gpqa_row(number, **changes):
    """As in the published file, which has many more columns and line ends around its texts."""
    row = {
        "Question": f"Which of these is {number}?\n",
        "Correct Answer": f" {number}\n",
        "Record ID": "rec",
    }
    return {**row, **{name: f"{number + i}" for i, name in enumerate(WRONG, 1)}, **changes}


def read(tmp_path, preset, rows, seed=0, count=None):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ProblemSource(source=str(path))
    return benchmark_problems(source, preset, seed, count or len(rows))


def identity(problem):
    task, operands = problem.id.split(":")
    return task, tuple(sorted(map(int, operands.split(","))))


def test_held_out_problems_are_distinct_and_never_calibrated_on():
    held_out = held_out_problems("arithmetic", 300)
    assert len({identity(p) for p in held_out}) == 300
    calibration = {identity(p) for p in load_problems(ProblemSource(limit=2000), seed=0)}
    assert len(calibration) == 2000
    assert not calibration & {identity(p) for p in held_out}
    assert held_out[:100] == held_out_problems("arithmetic", 100)
    assert held_out[:100] != held_out_problems("arithmetic", 100, seed=1)


def test_held_out_problems_of_reasoning_gym_are_not_those_of_calibration():
    """Also in the second chunk of items, and by their ids: a file of answers never mixes both."""
    source = "reasoning-gym:spell_backward,chain_sum"
    held_out = held_out_problems(source, 1004)
    calibration = list(islice(load_problems(ProblemSource(source=source), seed=0), 1004))
    assert not {p.id for p in held_out} & {p.id for p in calibration}
    sums = [{p.question for p in side if p.task == "chain_sum"} for side in (held_out, calibration)]
    assert len(sums[0]) > 490
    assert len(sums[0] & sums[1]) < 25  # two sums of two digits are sometimes the same
    assert held_out[:5] == held_out_problems(source, 5)
    assert held_out[:5] != held_out_problems(source, 5, seed=1)
    for problem in (held_out[0], held_out[1002], calibration[1002]):
        item = gym_item(ProblemSource(source=source), 0, problem.id)
        assert check_answer("reasoning-gym", problem.answer, *item)
        assert not check_answer("reasoning-gym", "nonsense", *item)


def test_a_file_with_answers(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "1+1?", "gold": 2}\n{"question": "2+2?", "gold": 4}\n')
    problems = held_out_problems(str(path), 2, answer_column="gold")
    assert {(p.question, p.answer) for p in problems} == {("1+1?", "2"), ("2+2?", "4")}
    with pytest.raises(RacError, match="gave 2 of 3 problems"):
        held_out_problems(str(path), 3, answer_column="gold")
    with pytest.raises(RacError, match="split: 'test' has no effect"):
        held_out_problems(str(path), 1, split="test")


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


def test_the_reference_of_a_worked_solution_is_its_last_line(tmp_path):
    answers = {
        "a": "3 * 4 = <<3*4=12>>12\n#### 12",
        "b": "so\n#### -1,200 \n",
        "c": "#### 0.5",
        "d": "#### 1\nno\n#### 2",
    }
    rows = [{"question": name, "answer": text} for name, text in answers.items()]
    actual = {p.question[0]: p.answer for p in read(tmp_path, SOLUTION, rows)}
    assert actual == {"a": "12", "b": "-1200", "c": "0.5", "d": "2"}


def test_a_solution_without_a_last_line_is_refused(tmp_path):
    for answer in ("12", "#### 12\nand more", "####", "##### "):
        with pytest.raises(RacError, match="row 0: column 'answer' must end in a line '#### ans"):
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
        assert (lines[0], lines[1], *lines[-2:]) == (question, "", "", "Use a box.")
        assert [line[:3] for line in lines[2:6]] == ["A) ", "B) ", "C) ", "D) "]
        assert sorted(line[3:] for line in lines[2:6]) == sorted(str(10 * i + k) for k in range(4))
        assert f"{problem.answer}) {10 * i}" in lines
        assert again[question] == replace(problem, id=again[question].id)
    question, letter = _with_choices("What is 2 + 2?", ["4", "3", "5", "22"])  # in every version
    assert (question, letter) == ("What is 2 + 2?\n\nA) 4\nB) 5\nC) 3\nD) 22", "A")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Correct Answer": None}, "row 0: column 'Correct Answer' is empty; complete the"),
        ({"Question": 5}, "row 0: column 'Question' must hold the question as text, .* 5;"),
        ({WRONG[1]: "  "}, f"row 0: column '{WRONG[1]}' is empty"),
    ],
)
def test_a_row_that_lacks_something_is_named(tmp_path, changes, message):
    with pytest.raises(RacError, match=message):
        read(tmp_path, CHOICES, [gpqa_row(1, **changes)])


def test_missing_columns_and_rows_are_named(tmp_path):
    with pytest.raises(RacError, match="has no column 'Question', but problem"):
        read(tmp_path, CHOICES, [{"problem": "1 + 1?"}])
    with pytest.raises(RacError, match="gave 1 of 2 problems"):
        read(tmp_path, PLAIN, [{"problem": "1 + 1?", "answer": "2"}], count=2)


def test_a_letter():
    right = (" c ", "(C)", "C.", "$C$", r"\textbf{(C)}", "(C) 12 nm", r"\mathrm{\text{C}}")
    for answer in (*right, "C) and so on"):
        text = rf"\boxed{{A}}? no.</think>The answer is \boxed{{{answer}}}."
        assert is_correct(text, "C", same_letter), answer
    wrong = ("D", "A, C", "C or A", "Carbon", "12 nm", "CC", "", "()")
    for answer in (*wrong, "(C) or (A)", "C) and D)", "(C) , (D)", "(C) / D", "C. OR A."):
        assert not same_letter(answer, "C"), answer
