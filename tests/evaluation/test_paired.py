import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation.intervals import tango_interval
from rac_modifier.evaluation.paired import paired_difference
from rac_modifier.evaluation.results import EvalResult
from tests.evaluation.test_results import result, row


def answers(outcomes, label, **changes):
    return result(
        [row(correct=bool(right), name=f"q{i}") for i, right in enumerate(outcomes)],
        label=label,
        **changes,
    )


def test_a_difference_is_paired():
    """Unpaired, an interval of 4 of 200 problems would hold 0."""
    dense, sparse = [1] * 180 + [0] * 20, [1] * 172 + [0] * 28
    found = paired_difference(answers(dense, "dense"), answers(sparse, "2:4"))
    assert (found.only_first, found.only_second, found.problems) == (8, 0, 200)
    assert found.difference == pytest.approx(-0.04)
    assert (found.ci_low, found.ci_high) == tango_interval(8, 0, 200)
    assert found.p_value == pytest.approx(2 / 2**8)
    assert found.describe() == (
        "2:4 against dense: -4.0 points (-7.7 to -2.0); of 200 problems 8 are solved by dense alone, 0 by 2:4 alone "
        "(McNemar p = 0.0078)"
    )


def test_several_answers_per_problem_are_paired_by_their_share():
    def of(counts, label):
        rows = [
            row(correct=i < count, name=f"q{q}", sample=i)
            for q, count in enumerate(counts)
            for i in range(4)
        ]
        return result(rows, label=label)

    found = paired_difference(of([4, 2, 0], "dense"), of([2, 2, 1], "2:4"))
    assert found.difference == pytest.approx((-2 + 0 + 1) / 12)
    assert found.p_value is None
    assert "paired over 3 problems" in found.describe()


def test_a_result_without_endings_has_no_inflation():
    dense, sparse = answers([1, 0], "dense"), answers([1, 0], "2:4")
    older = dense.as_dict() | {"repeating_share": 0.0}
    del older["endings"]
    assert paired_difference(dense, sparse).inflation.at_cap.ratio == 1.0
    assert paired_difference(EvalResult.from_dict(older), sparse).inflation is None


def test_what_cannot_be_paired_is_refused():
    dense = answers([1, 0], "dense")
    with pytest.raises(RacError, match=r"other problems \(1 differ, the first is 'q2'\)"):
        paired_difference(dense, answers([1, 0, 1], "2:4"))
    with pytest.raises(RacError, match="cap 64 and 128"):
        paired_difference(dense, answers([1, 0], "2:4", cap=128))
