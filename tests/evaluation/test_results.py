import itertools
import math

import pytest

from rac_modifier.evaluation.results import EvalResult, PairedDifference, Row
from rac_modifier.evaluation.stopping import Ending
from rac_modifier.measure.intervals import _tango_interval, _wilson_interval, ratio_interval
from rac_modifier.settings.sampling import SamplingSettings

NUMBERS = itertools.count()


def row(correct=True, kind=None, tokens=10, thinking=8, task="addition", name=None):
    kind = kind or ("right" if correct else "wrong")
    ending = Ending(kind, tokens, thinking, closes=thinking < tokens)
    return Row(name or f"p{next(NUMBERS)}", task, correct, ending)


def result(rows, label="dense", cap=64, temperature=0.0, generated=None, seed=0):
    sampling = SamplingSettings(max_new_tokens=cap, temperature=temperature, seed=seed)
    return EvalResult.of(rows, label=label, seconds=2.0, sampling=sampling, generated=generated)


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
    assert (found.ci_low, found.ci_high) == _wilson_interval(3, 4)
    assert result(rows, generated=30).tokens_per_second == 15  # of this run, in 2 s
    assert result(rows, generated=0).tokens_per_second == 0.0


def test_several_answers_per_problem():
    outcomes = {"a": [1, 1, 0, 0], "b": [0, 0, 0, 0], "c": [1, 1, 1, 1]}
    rows = [
        row(correct=bool(value), name=name, thinking=10 * (i + 1))
        for name, values in outcomes.items()
        for i, value in enumerate(values)
    ]
    found = result(rows)
    assert (found.problems, found.samples, found.correct, found.accuracy) == (3, 4, 6, 0.5)
    assert found.pass_at == pytest.approx({"1": 0.5, "2": (5 / 6 + 0 + 1) / 3, "4": 2 / 3})
    assert found.correct_answers == {"a": 2, "b": 0, "c": 4}
    assert (found.ci_low, found.ci_high) == ratio_interval([0.5, 0.0, 1.0], [1.0] * 3)


def answers(outcomes, label, **changes):
    rows = [row(correct=bool(right), name=f"q{i}") for i, right in enumerate(outcomes)]
    return result(rows, label=label, **changes)


def test_a_difference_is_paired():
    """Unpaired, an interval of 4 of 200 problems would hold 0."""
    dense, sparse = [1] * 180 + [0] * 20, [1] * 172 + [0] * 28
    found = PairedDifference.of(answers(dense, "dense"), answers(sparse, "2:4"))
    assert (found.only_first, found.only_second, found.problems) == (8, 0, 200)
    assert found.difference == pytest.approx(-0.04)
    assert (found.ci_low, found.ci_high) == _tango_interval(8, 0, 200)
    assert found.p_value == pytest.approx(2 / 2**8)
    assert found.inflation.at_cap.ratio == 1.0
    assert found.describe() == (
        "2:4 against dense: -4.0 points (-7.7 to -2.0); of 200 problems 8 are solved by dense "
        "alone, 0 by 2:4 alone (McNemar p = 0.0078)"
    )


def test_truncated_answers_are_paired():
    """Two coins of eleven fall one way: no difference beyond chance."""

    def of(truncated, label):
        rows = [
            row(kind="looping" if f"q{i}" in truncated else "right", name=f"q{i}")
            for i in range(12)
        ]
        return result(rows, label=label)

    dense = of({"q0", "q1", "q2"}, "dense")
    pair = PairedDifference.of(dense, of({"q2", *(f"q{i}" for i in range(3, 12))}, "2:4"))
    counts = (pair.truncated_only_first, pair.truncated_only_second)
    assert counts == (2, 9)
    chance = sum(math.comb(11, i) for i in range(3)) / 2**11  # at most 2 of 11 coins
    assert pair.truncated_p_value == pytest.approx(2 * chance)
    assert pair.describe_truncated() == (
        "truncated: 9 answers of 2:4 alone, 2 of dense alone (McNemar p = 0.065)"
    )
    assert PairedDifference.of(dense, dense).describe_truncated() is None


def test_several_answers_per_problem_are_paired_by_their_share():
    def of(counts, label):
        rows = [
            row(correct=i < count, name=f"q{q}") for q, count in enumerate(counts) for i in range(4)
        ]
        return result(rows, label=label)

    found = PairedDifference.of(of([4, 2, 0], "dense"), of([2, 2, 1], "2:4"))
    assert found.difference == pytest.approx((-2 + 0 + 1) / 12)
    assert found.p_value is None
    assert found.describe_truncated() is None
    assert "paired over 3 problems" in found.describe()
