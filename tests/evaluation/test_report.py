import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation import report
from rac_modifier.evaluation.report import (
    accuracy_table,
    divergence_table,
    plot_bars,
    plot_divergence,
    plot_file,
    stopping_table,
)
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


def test_several_answers_have_a_column_for_the_largest_k():
    answers = [row(correct=i == 0, name="q") for i in range(4)]
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


A, B = divergence_result(label="a"), divergence_result(label="b", bins=3)
OTHER = r"different sequences or bins .*a: 4 tokens of 2 sequences, b: 1 tokens"


@pytest.mark.parametrize(
    ("show", "results", "message"),
    [
        (accuracy_table, [], "no results"),
        (plot_bars, [], "no results"),
        (accuracy_table, [result([row()]), result([row()], cap=128)], r"caps \(64, 128 new tok"),
        (plot_bars, [result([row()]), result([row()], cap=128)], r"caps \(64, 128 new tokens\)"),
        (
            accuracy_table,
            [result([row()]), result([row(name="q") for i in range(2)])],
            "results of 1 and 2 answers per problem",
        ),
        (divergence_table, [], "no divergence results"),
        (plot_divergence, [], "no divergence results"),
        (divergence_table, [A, divergence_result(((0.5,),), "b")], OTHER),
        (plot_divergence, [A, B], "different sequences or bins"),
    ],
)
def test_what_cannot_be_compared_is_refused(show, results, message, tmp_path):
    path = [tmp_path / "plot.png"] if show in (plot_bars, plot_divergence) else []
    with pytest.raises(RacError, match=message):
        show(results, *path)


@pytest.fixture
def drawn(monkeypatch):
    """The Vega-Lite specifications that were drawn."""
    specs = []
    monkeypatch.setattr(report, "save", lambda chart, path: specs.append(chart.to_dict()))
    return specs


def values_of(panel, name):
    return [value[name] for value in panel["data"]["values"]]


def test_divergence_is_drawn_at_the_middle_of_each_bin_with_its_error(drawn, monkeypatch, tmp_path):
    """Nine positions in three bins; the second completion does not reach the last bin."""
    monkeypatch.setattr("rac_modifier.evaluation.intervals.LEAST_ROWS", 2)
    kl = ((0.5, 0.1, 0.3, 0.2, 0.6, 0.1, 0.8, 0.4, 0.9), (0.2, 0.6, 0.1, 0.3, 0.5))
    shown = divergence_result(kl, bins=3)
    plot_divergence([shown, divergence_result(kl, "b", 3)], tmp_path / "plot.png")
    for panel, name in zip(drawn[0]["hconcat"], ("kl", "agreement"), strict=True):
        panel = panel["layer"][0] | panel
        assert values_of(panel, "position") == [1.5, 4.5, 7.5] * 2
        assert values_of(panel, "model") == ["2:4, RAC"] * 3 + ["b"] * 3
        assert values_of(panel, "mean")[:3] == [getattr(b, name) for b in shown.bins]
        errors = [getattr(b, f"{name}_stderr") or 0 for b in shown.bins]
        ends = zip(values_of(panel, "low"), values_of(panel, "high"), strict=True)
        width = [(high - low) / 2 for low, high in ends][:3]
        assert width == pytest.approx(errors)
        assert errors[0] > 0 == errors[2]


def test_bars_are_accuracy_with_its_interval_and_the_unfinished_share(drawn, tmp_path):
    results = [result([row()]), result([row(), row(correct=False, kind="going")], label="RAC")]
    plot_bars(results, tmp_path / "bars.png")
    assert values_of(drawn[0], "share") == [1.0, 0.5]
    assert values_of(drawn[0], "unfinished") == [0.0, 0.5]
    assert values_of(drawn[0], "low") == [r.ci_low for r in results]
    assert "Not finished within 64 tokens" in str(drawn[0])


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_a_plot_is_written_in_a_new_folder(tmp_path, suffix):
    path = plot_divergence([A], tmp_path / "new" / f"plot{suffix}")
    assert path.stat().st_size > 4000
    if suffix == ".svg":
        assert "position in the completion, tokens" in path.read_text()


def test_a_plot_that_cannot_be_written(monkeypatch):
    with pytest.raises(RacError, match=r"plot\.txt.*\.png, \.svg, \.pdf"):
        plot_file("plot.txt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RacError, match=r"rac-modifier\[eval\]"):
        plot_bars([result([row()])], "plot.png")
