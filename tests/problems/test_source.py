import json
import math
from itertools import islice

import pytest
from datasets import Dataset

from rac_modifier.errors import RacError
from rac_modifier.problems.arithmetic import Solved
from rac_modifier.problems.source import load_problems
from rac_modifier.settings.problems import ProblemSource


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


@pytest.fixture
def questions(tmp_path):
    rows = [
        {"problem": f"What is {i} + {i}?", "solution": 2 * i, "level": "easy"} for i in range(20)
    ]
    return write(tmp_path / "set.jsonl", rows)


def take(n, seed=0, **fields):
    return list(islice(load_problems(ProblemSource(**fields), seed), n))


def test_arithmetic_is_distinct_and_from_the_calibration_split():
    problems = take(300)
    assert len({p.id for p in problems}) == 300
    for problem in problems:
        task, operands = problem.id.split(":")
        solved = Solved(task, tuple(map(int, operands.split(","))), "", "")
        assert solved.split == "calibration"
        assert problem.answer is not None
        assert problem.task == task


def test_the_seed_decides_and_a_limit_only_cuts():
    assert take(30) == take(30)
    assert take(30) != take(30, seed=1)
    assert take(100, limit=7) == take(7)


def test_table_ids_do_not_shift_with_the_limit_or_the_order(questions):
    everything = {p.id: p for p in take(100, source=questions)}
    assert len(everything) == 20
    some = take(100, source=questions, limit=5)
    assert len(some) == 5
    assert all(everything[p.id] == p for p in some)
    other = {p.id: p for p in take(100, seed=1, source=questions)}
    assert other == everything
    assert list(other) != list(everything)
    assert {p.answer for p in everything.values()} == {None}
    answered = take(100, source=questions, answer_column="solution")
    assert {p.answer for p in answered} == {str(2 * i) for i in range(20)}


def test_an_edited_row_is_another_problem(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", [{"problem": f"{i} + 1?"}]) for i in range(2)]
    assert len({take(1, source=path)[0].id for path in paths}) == 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("2024-01-05", "column 'answer' holds the datetime .*; write answers as text"),
        (10**30, r"column 'answer' holds the float 1e\+30, maybe not as written"),
    ],
)
def test_an_answer_that_is_not_read_as_it_was_written_is_refused(tmp_path, answer, words):
    path = write(tmp_path / "a.jsonl", [{"problem": "x", "answer": answer}])
    with pytest.raises(RacError, match=words):
        take(1, source=path, answer_column="answer")


def test_a_missing_number_is_no_answer(tmp_path):
    """pandas writes an integer column with a gap as floats with NaN."""
    frame = {"problem": ["1 + 1?", "1 + 2?"], "answer": [2.0, math.nan]}
    Dataset.from_dict(frame).to_parquet(tmp_path / "a.parquet")
    problems = take(2, source=str(tmp_path / "a.parquet"), answer_column="answer")
    assert {p.question: p.answer for p in problems} == {"1 + 1?": "2.0", "1 + 2?": None}


def test_a_small_number_is_no_product_with_e(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": "x", "answer": 0.00001}])
    assert take(1, source=path, answer_column="answer")[0].answer == "0.00001"


def test_reasoning_gym_takes_its_tasks_in_turn():
    problems = take(6, source="reasoning-gym:chain_sum, gcd")
    assert [p.task for p in problems] == ["chain_sum", "gcd"] * 3
    assert [p.id for p in problems[::2]] == ["chain_sum:0", "chain_sum:1", "chain_sum:2"]
    assert take(6, source="reasoning-gym:chain_sum, gcd") == problems


def test_unknown_reasoning_gym_task_suggests_close_ones():
    with pytest.raises(RacError, match=r"'chain_sums'.*chain_sum"):
        load_problems(ProblemSource(source="reasoning-gym:chain_sums"), 0)


def test_a_wrong_column_names_those_there_are(questions):
    with pytest.raises(RacError, match=r"no column 'query'.*problem, solution, level"):
        load_problems(ProblemSource(source=questions, column="query"), 0)


@pytest.mark.parametrize("row", [{"text": "x"}, {"problem": "x", "prompt": "y"}])
def test_the_question_column_is_not_guessed_where_it_is_unclear(tmp_path, row):
    with pytest.raises(RacError, match="set `column`"):
        load_problems(ProblemSource(source=write(tmp_path / "a.jsonl", [row])), 0)


@pytest.mark.parametrize("question", [None, "  ", [{"role": "user", "content": "x"}]])
def test_a_question_must_be_text(tmp_path, question):
    path = write(tmp_path / "a.jsonl", [{"problem": question}])
    with pytest.raises(RacError, match="row 0: column 'problem' must hold the question as text"):
        take(1, source=path)
