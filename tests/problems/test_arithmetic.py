import math
import re
from itertools import islice

import pytest

from rac_modifier.problems.arithmetic import TASKS, Solved, generate, generate_distinct
from training.arithmetic_thinking import thinking_of

ANSWERS = {
    "addition": lambda operands: sum(operands),
    "multiplication": math.prod,
    "gcd": lambda operands: math.gcd(*operands),
    "division": lambda operands: operands[0] // operands[1],
}
CALCULATE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def split_of(task, operands):
    return Solved(task, operands, "", "").split


@pytest.mark.parametrize("task", TASKS)
def test_every_step_of_a_chain_is_true_and_the_answer_right(task):
    steps = 0
    for problem in islice((p for p in generate(0, "train") if p.task == task), 300):
        assert problem.answer == str(ANSWERS[task](problem.operands)), problem.question
        thinking = thinking_of(problem)
        # division writes a zero before a quotient that is shorter than the dividend
        assert int(re.findall(r"\d+", thinking)[-1]) == int(problem.answer)
        for a, sign, b, c in re.findall(r"(\d+)([-+*])(\d+)=(\d+)", thinking):
            assert CALCULATE[sign](int(a), int(b)) == int(c), thinking
            steps += 1
        for operand in problem.operands:
            assert re.search(rf"\b{operand}\b", problem.question)
    assert steps > 3 * 300


def test_splits_share_no_operands_in_any_order():
    splits = ("train", "calibration", "test")
    seen = {split: {p.identity for p in islice(generate(1, split), 1500)} for split in splits}
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))
    assert all(
        split_of("addition", (a, 7, 900)) == split_of("addition", (900, a, 7)) for a in range(500)
    )
    drawn = [split_of("division", (n, 7)) for n in range(1000, 21000)]
    assert drawn.count("test") / len(drawn) == pytest.approx(0.05, abs=0.01)
    assert drawn.count("calibration") / len(drawn) == pytest.approx(0.10, abs=0.01)


def test_a_seed_gives_the_same_problems_and_another_seed_others():
    first = list(islice(generate(3, "train"), 40))
    assert first == list(islice(generate(3, "train"), 40))
    assert first != list(islice(generate(4, "train"), 40))
    assert [p.task for p in first[:4]] == list(TASKS)
    assert len({p.identity for p in islice(generate_distinct(0, "test"), 400)}) == 400
