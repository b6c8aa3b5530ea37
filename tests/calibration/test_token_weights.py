import pytest

from rac_modifier import RacError
from rac_modifier.calibration.token_weights import find_weighting, mean_one_factor
from rac_modifier.traces.records import Trace


def trace(length, finish="stop"):
    return Trace(f"t{length}#0", f"t{length}", (1, 2), (3,) * (length - 2), finish, 0, "?", "1")


def never(trace):
    raise AssertionError("answers are checked for `correct` only")


def test_named_weightings():
    assert find_weighting("uniform", never) is None
    assert find_weighting("inverse_length", never)(trace(20)) == 0.05
    right = find_weighting("correct", lambda t: t.tokens == 20)
    assert (right(trace(20)), right(trace(21))) == (1.0, 0.0)


def test_a_function_is_called_with_each_trace():
    weigh = find_weighting(lambda t: 2 if t.finish_reason == "stop" else 1, never)
    assert (weigh(trace(5)), weigh(trace(5, "length"))) == (2.0, 1.0)
    assert find_weighting(lambda t: 0, never)(trace(5)) == 0.0


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "1", None])
def test_what_is_no_weight_is_refused_with_the_names_of_function_and_trace(weight):
    def by_mood(trace):
        return weight

    with pytest.raises(
        RacError, match=r"by_mood gives trace 't5#0' the weight .*; return a number of at least 0"
    ):
        find_weighting(by_mood, never)(trace(5))


def test_the_factor_gives_a_mean_of_one_per_token():
    pairs = [(0.5, 10), (2.0, 30), (0.0, 60)]
    assert mean_one_factor(pairs) == 100 / 65
    with pytest.raises(RacError, match="weighs 0"):
        mean_one_factor([(0.0, 10)])
