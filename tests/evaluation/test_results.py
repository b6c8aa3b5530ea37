import itertools
import json
from dataclasses import replace

import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation.intervals import bootstrap_interval, wilson_interval
from rac_modifier.evaluation.results import EvalResult, Row, summarise
from rac_modifier.evaluation.stopping import Ending, Loop

NUMBERS = itertools.count()


def row(
    correct=True,
    kind=None,
    tokens=10,
    thinking=8,
    task="addition",
    name=None,
    sample=0,
):
    kind = kind or ("right" if correct else "wrong")
    ending = Ending(kind, tokens, thinking, closes=thinking < tokens)
    return Row(name or f"p{next(NUMBERS)}", task, correct, "", sample, ending)


def result(rows, **changes):
    return summarise(
        rows,
        **{"label": "dense", "seconds": 2.0, "cap": 64, "temperature": 0.0, "seed": 0} | changes,
    )


def test_summary():
    rows = [
        row(tokens=10, thinking=8),
        row(correct=False, kind="going", tokens=64, thinking=64),
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
    looping = row(correct=False, kind="looping")
    ending = replace(looping.ending, loop=Loop(3, 2, "tokens"))
    found = result([row(), replace(looping, ending=ending)])
    assert EvalResult.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_fields_of_another_version_are_named():
    values = result([row()]).as_dict()
    del values["cap"]
    with pytest.raises(RacError, match=r"missing \['cap'\], unknown \['limit'\]"):
        EvalResult.from_dict(values | {"limit": 3})


def test_several_answers_per_problem():
    outcomes = {"a": [1, 1, 0, 0], "b": [0, 0, 0, 0], "c": [1, 1, 1, 1]}
    rows = [
        row(correct=bool(value), name=name, sample=i, thinking=10 * (i + 1))
        for name, values in outcomes.items()
        for i, value in enumerate(values)
    ]
    found = result(rows)
    assert (found.problems, found.samples, found.correct, found.accuracy) == (3, 4, 6, 0.5)
    assert found.pass_at == pytest.approx({"1": 0.5, "2": (5 / 6 + 0 + 1) / 3, "4": 2 / 3})
    assert found.correct_answers == {"a": 2, "b": 0, "c": 4}
    assert found.thinking_percentiles == pytest.approx({"50": 25.0, "90": 40.0, "99": 40.0})
    assert (found.ci_low, found.ci_high) == bootstrap_interval([0.5, 0.0, 1.0])


def test_speed_is_that_of_what_this_run_generated():
    rows = [row(tokens=10), row(tokens=30)]
    assert result(rows, generated=30).tokens_per_second == 15
    assert result(rows, generated=0).tokens_per_second == 0.0
