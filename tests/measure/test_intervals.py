"""Intervals against published values, brute force and counting."""

import itertools
import math
import statistics
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.measure.intervals import (
    _pass_at_k,
    _tango_interval,
    _wilson_interval,
    difference_interval,
    mcnemar,
    mean_over_tokens,
    mean_pass_at,
    ratio_interval,
    share_interval,
)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_against_published_values(correct, total, low, high):
    assert _wilson_interval(correct, total) == pytest.approx((low, high), abs=6e-5)


KL = st.floats(0, 50)


def searched_score(lost: int, gained: int, total: int, d: float) -> float:
    """The score statistic of a difference d; its nuisance probability by a search of the
    likelihood."""

    def likelihood(p: float) -> float:
        outcomes = ((gained, p + d), (lost, p), (total - gained - lost, 1 - 2 * p - d))
        return sum(n * math.log(chance) for n, chance in outcomes if n)

    low, high = max(0.0, -d), (1 - d) / 2
    for _ in range(6):  # each time a grid around the best of the last
        step = (high - low) / 1000
        grid = [low + step * (i + 0.5) for i in range(1000)]
        best = max(grid, key=likelihood)
        low, high = max(low, best - step), min(high, best + step)
    return (gained - lost - total * d) / math.sqrt(total * (2 * best + d - d * d))


DISCORDANT = [(8, 0, 200), (2, 12, 50), (5, 5, 30), (1, 0, 10)]


@pytest.mark.parametrize(("lost", "gained", "total"), DISCORDANT)
def test_tango_bounds_solve_the_score_equation_with_a_searched_likelihood(lost, gained, total):
    low, high = _tango_interval(lost, gained, total)
    assert low < (gained - lost) / total < high
    assert searched_score(lost, gained, total, low) == pytest.approx(1.959964, abs=1e-3)
    assert searched_score(lost, gained, total, high) == pytest.approx(-1.959964, abs=1e-3)


def test_without_a_discordant_pair_tango_is_the_rule_of_four():
    """The score is n d / sqrt(n |d| (1 - |d|)) there, so |d| = z^2 / (n + z^2)."""
    bound = 1.959964**2 / (60 + 1.959964**2)
    assert _tango_interval(0, 0, 60) == pytest.approx((-bound, bound), abs=1e-9)


@pytest.mark.parametrize("interval", [share_interval, difference_interval])
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_an_interval_of_equal_values_is_no_point(interval, value):
    for count in (1, 60):
        low, high = interval([value] * count)
        assert low <= value <= high
        assert high - low > 0.02


def test_several_answers_are_bootstrapped_over_problems():
    """With many problems it is mean +- 1.96 standard errors."""
    values = [0.0, 0.25, 0.5, 1.0] * 100
    error = math.sqrt(sum((v - 0.4375) ** 2 for v in values)) / len(values)
    expected = 0.4375 - 1.96 * error, 0.4375 + 1.96 * error
    assert share_interval(values) == pytest.approx(expected, abs=0.003)
    assert difference_interval(values) == share_interval(values)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 9), (5, 5), (0, 7)])
def test_mcnemar_is_the_share_of_all_coin_tosses_that_are_as_uneven(lost, gained):
    tosses = list(itertools.product((0, 1), repeat=lost + gained))
    as_uneven = [abs(2 * sum(t) - len(t)) >= abs(lost - gained) for t in tosses]
    assert mcnemar(lost, gained) == pytest.approx(sum(as_uneven) / len(tosses))


def test_mcnemar_of_more_pairs_than_a_float_has_powers_of_two():
    tail = sum(math.comb(1100, i) for i in range(501))
    assert mcnemar(600, 500) == pytest.approx(float(Fraction(2 * tail, 2**1100)), rel=1e-9)


@given(
    st.integers(1, 8).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n), st.integers(1, n)))
)
def test_pass_at_k_is_the_share_of_all_choices_of_k_answers_that_hold_a_right_one(counts):
    correct, samples, k = counts
    answers = [True] * correct + [False] * (samples - correct)
    choices = list(itertools.combinations(answers, k))
    assert _pass_at_k(correct, samples, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_is_reported_for_powers_of_two_and_all():
    assert list(mean_pass_at([0, 6], 6)) == ["1", "2", "4", "6"]
    assert list(mean_pass_at([1], 1)) == ["1"]


@given(st.lists(st.tuples(KL, KL, KL), min_size=16, max_size=20))
def test_the_error_of_rows_of_one_length_is_that_of_their_means(rows):
    mean, error = mean_over_tokens(rows)
    means = [statistics.fmean(row) for row in rows]
    assert mean == pytest.approx(statistics.fmean(means))
    assert error == pytest.approx(statistics.stdev(means) / math.sqrt(len(means)), abs=1e-9)


def test_tokens_of_a_row_that_err_together_count_as_one():
    """A naive error over tokens would be ten times smaller."""
    _, error = mean_over_tokens([[0.0] * 100, [1.0] * 100] * 8)
    assert error == pytest.approx(statistics.stdev([0, 1] * 8) / 4)


def test_there_is_no_error_below_sixteen_rows():
    rows = [[0.0, 1.0]] * 15
    assert mean_over_tokens(rows) == (0.5, None)
    assert mean_over_tokens([*rows, [1.0, 0.0]]) == (0.5, 0.0)


def test_the_bootstrap_draws_every_resample_of_three_problems_alike():
    above, below = [1.0, 5.0, 9.0], [2.0, 3.0, 4.0]
    every = [
        sum(above[i] for i in problems) / sum(below[i] for i in problems)
        for problems in itertools.product(range(3), repeat=3)
    ]
    low, high = ratio_interval(above, below)
    assert (low, high) == pytest.approx((min(every), max(every)))  # each extreme has 1 of 27
