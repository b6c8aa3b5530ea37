import pytest

from rac_modifier.errors import RacError
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.problems.source import load_problems
from rac_modifier.settings.problems import ProblemSource


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


def test_a_file_with_answers(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "1+1?", "gold": 2}\n{"question": "2+2?", "gold": 4}\n')
    problems = held_out_problems(str(path), 2, answer_column="gold")
    assert {(p.question, p.answer) for p in problems} == {("1+1?", "2"), ("2+2?", "4")}
    with pytest.raises(RacError, match="gave 2 problems of the 3 asked for"):
        held_out_problems(str(path), 3, answer_column="gold")


def test_too_few():
    with pytest.raises(RacError, match="0 problems"):
        held_out_problems("arithmetic", 0)


def test_the_split_is_that_of_a_dataset(tmp_path):
    with pytest.raises(RacError, match=r"split=.test. does not apply"):
        held_out_problems(str(tmp_path / "problems.jsonl"), 1, split="test")
