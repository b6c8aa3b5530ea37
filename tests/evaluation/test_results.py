import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.evaluation.results import EvalResult, Row, summarise, wilson_interval


def row(correct=True, finish="stop", tokens=10, thinking=8, task="addition"):
    return Row("p", task, correct, finish, 5, tokens, thinking, "")


def result(rows, **changes):
    return summarise(rows, **{"label": "dense", "seconds": 2.0, "cap": 64, "temperature": 0.0, "seed": 0} | changes)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_against_published_values(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_solve_the_score_equation(counts):
    correct, total = counts
    low, high = wilson_interval(correct, total)
    share = correct / total
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1 and bound != share:
            assert abs(share - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / total), rel=1e-6)


def test_summary():
    rows = [
        row(tokens=10, thinking=8),
        row(correct=False, finish="length", tokens=64, thinking=64),
        row(tokens=16, thinking=9, task="gcd"),
        row(tokens=30, thinking=3, task=None),
    ]
    found = result(rows)
    assert (found.problems, found.correct, found.accuracy) == (4, 3, 0.75)
    assert (found.mean_completion_tokens, found.mean_thinking_tokens) == (30, 21)
    assert (found.unfinished_share, found.tokens_per_second) == (0.25, 60)
    assert found.per_task == {"addition": 0.5, "gcd": 1.0}
    assert (found.ci_low, found.ci_high) == wilson_interval(3, 4)


def test_results_survive_json():
    found = result([row(), row(correct=False)])
    assert EvalResult.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_fields_of_another_version_are_named():
    values = result([row()]).as_dict()
    del values["cap"]
    with pytest.raises(RacError, match=r"missing \['cap'\], unknown \['limit'\]"):
        EvalResult.from_dict(values | {"limit": 3})
