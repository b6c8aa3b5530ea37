import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation.plot import plot_divergence
from rac_modifier.evaluation.report import accuracy_table, divergence_table, stopping_table
from tests.evaluation.test_divergence import result as divergence_result
from tests.evaluation.test_results import result, row


def test_a_row_per_result_in_the_order_given():
    table = accuracy_table(
        [result([row()]), result([row(), row(correct=False, kind="going")], label="2:4, RAC")]
    )
    assert len(table.head) == len(table.rows[0]) == 9
    assert table.rows[0] == ("dense", "100.0%", "20.7-100.0", "8", "10", "0.0%", "5", "0.0", "1")
    assert table.rows[1][:6] == ("2:4, RAC", "50.0%", "9.5-90.5", "8", "10", "50.0%")
    assert table.note == "At most 64 new tokens per answer; greedy."


def test_a_share_per_kind_of_ending_and_mean_lengths():
    kinds = ["right", "right", "right", "wrong", "wrong", "reached", "reached", "looping"]
    rows = [row(kind=kind) for kind in kinds]
    rows += [row(kind="going", thinking=10) for _ in range(2)]
    table = stopping_table([result(rows)])
    shares = ("30.0%", "20.0%", "20.0%", "10.0%", "20.0%", "80.0%")
    assert table.rows == (("dense", *shares, "8", "2"),)
    assert len(table.head) == 9


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(RacError, match=r"different caps \(64, 128 new tokens\)"):
        accuracy_table([result([row()]), result([row()], cap=128)])
    several = result([row(name="q", sample=i) for i in range(2)])
    with pytest.raises(RacError, match="results of 1 and 2 answers per problem"):
        accuracy_table([result([row()]), several])
    with pytest.raises(RacError, match="no results"):
        accuracy_table([])


def test_several_answers_have_a_column_for_the_largest_k():
    answers = [row(correct=i == 0, name="q", sample=i) for i in range(4)]
    table = accuracy_table([result(answers, temperature=0.6)])
    assert (table.head[-1], table.rows[0][1], table.rows[0][-1]) == ("pass@4", "25.0%", "100.0%")
    assert table.note.endswith("; temperature 0.6; 4 answers per problem.")


def test_divergence_with_its_standard_error():
    table = divergence_table([divergence_result(((0.1, 0.2), (0.5, 0.3)) * 8)])
    ((label, kl, agreement),) = table.rows
    assert label == "2:4, RAC"
    assert kl.startswith("0.275 ± 0.0")
    assert agreement.startswith("50.0% ± ")
    assert table.note.startswith("KL(dense || model) on 32 completion tokens of 16 sequences")
    assert "±" not in "".join(
        divergence_table([divergence_result(((0.5,),))]).rows[0]
    )  # no error of one sequence


@pytest.mark.parametrize(
    "show", [divergence_table, lambda results: plot_divergence(results, "plot.png")]
)
def test_results_on_other_sequences_are_refused_side_by_side(show, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RacError, match="no divergence results"):
        show([])
    with pytest.raises(
        RacError, match=r"different sequences or bins .*a: 4 tokens of 2 sequences, b: 1 tokens"
    ):
        show([divergence_result(label="a"), divergence_result(((0.5,),), "b")])
    with pytest.raises(RacError, match="different sequences or bins"):
        show([divergence_result(label="a"), divergence_result(label="b", bins=3)])
