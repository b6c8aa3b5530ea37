"""Tables of results."""

from rac_modifier.evaluation.tables import accuracy_table, divergence_table, stopping_table
from rac_modifier.measure.divergence import DivergenceResult, TokenDivergence
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


def test_several_answers_have_a_column_for_the_largest_k():
    answers = [row(correct=i == 0, name="q") for i in range(4)]
    table = accuracy_table([result(answers, temperature=0.6)])
    assert (table.head[-1], table.rows[0][1], table.rows[0][-1]) == ("pass@4", "25.0%", "100.0%")
    assert table.note.endswith("; temperature 0.6; 4 answers per problem.")


def test_divergence_with_its_standard_error():
    def row(label, rows):
        completions = [TokenDivergence(kl, [kl[0] < 0.2] * len(kl)) for kl in rows]
        return DivergenceResult.of(completions, label)

    rows = ((0.1, 0.2), (0.5, 0.3)) * 8
    table = divergence_table([row("2:4", rows), row("one sequence", rows[:1])])
    (label, kl, agreement), (_, *alone) = table.rows
    assert label == "2:4"
    assert kl.startswith("0.275 ± 0.0")
    assert agreement.startswith("50.0% ± ")
    assert table.note.startswith("KL(dense || model) on 32 completion tokens of 16 sequences")
    assert alone == ["0.150", "100.0%"]
