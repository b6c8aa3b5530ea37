import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation.plot import plot_bars, plot_divergence, plot_file
from tests.evaluation.drawn import drawn as drawn
from tests.evaluation.test_divergence import result as divergence_result
from tests.evaluation.test_results import result, row

# Three bins of three positions; the second completion does not reach the last one.
LONG = ((0.5, 0.1, 0.3, 0.2, 0.6, 0.1, 0.8, 0.4, 0.9), (0.2, 0.6, 0.1, 0.3, 0.5))


def lines_of(axes):
    return [
        (line.get_label(), line.get_xdata().tolist(), line.get_ydata().tolist())
        for line in axes.lines
    ]


def test_divergence_is_drawn_at_the_middle_of_each_bin_up_to_the_end_of_the_last(drawn):
    results = [
        divergence_result(LONG, "RAC", bins=3),
        divergence_result([[k + 1 for k in row] for row in LONG], "b", 3),
    ]
    plot_divergence(results, "plot.png")
    left, right = drawn.figure.axes
    means = [
        (0.5 + 0.1 + 0.3 + 0.2 + 0.6 + 0.1) / 6,
        (0.2 + 0.6 + 0.1 + 0.3 + 0.5) / 5,
        (0.8 + 0.4 + 0.9) / 3,
    ]
    assert [(name, x) for name, x, _ in lines_of(left)] == [
        ("RAC", [1.5, 4.5, 7.5]),
        ("b", [1.5, 4.5, 7.5]),
    ]
    assert lines_of(left)[0][2] == pytest.approx(means)
    assert lines_of(left)[1][2] == pytest.approx([mean + 1 for mean in means])
    assert lines_of(right)[0][2] == pytest.approx(
        [50.0, 40.0, 0.0]
    )  # percent of the tokens with a KL below 0.25
    assert left.get_xlim() == right.get_xlim() == (0, 9)
    assert left.get_ylim()[0] == 0


def test_the_last_bin_ends_the_axis_where_its_width_is_no_divisor(drawn):
    """Seven positions in three bins: 0-2, 3-5 and 6-8, of which only 6 has a token."""
    plot_divergence([divergence_result((LONG[0][:7],), bins=3)], "plot.png")
    left, _ = drawn.figure.axes
    assert lines_of(left)[0][1] == [1.5, 4.5, 7.5]
    assert lines_of(left)[0][2][-1] == pytest.approx(0.8)
    assert left.get_xlim() == (0, 9)


def test_the_shade_is_one_standard_error_and_nothing_for_few_completions(drawn, monkeypatch):
    monkeypatch.setattr("rac_modifier.evaluation.intervals.LEAST_ROWS", 2)
    shown = divergence_result(LONG, bins=3)
    plot_divergence([shown], "plot.png")
    for axes, scale, name in zip(drawn.figure.axes, (1, 100), ("kl", "agreement"), strict=True):
        (shade,) = axes.collections
        corners = shade.get_paths()[0].vertices
        for b in shown.bins:
            at = sorted({round(y, 9) for x, y in corners if x == (b.start + b.end) / 2})
            mean, error = scale * getattr(b, name), scale * (getattr(b, f"{name}_stderr") or 0)
            assert [at[0], at[-1]] == pytest.approx([mean - error, mean + error], abs=1e-6)
    assert shown.bins[-1].kl_stderr is None


def test_divergence_plot_is_written_with_its_words(tmp_path):
    import matplotlib

    results = [
        divergence_result(label="RAC"),
        divergence_result(((0.9, 1.1, 2.0), (0.8,)), "prompts only"),
    ]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot_divergence(results, tmp_path / "new" / "plot.svg").read_text()
    for word in (
        "RAC",
        "prompts only",
        "position in the completion, tokens",
        "KL to the dense model",
    ):
        assert word in text, word
    assert plot_divergence([divergence_result()] * 6, tmp_path / "six.png").exists()
    with pytest.raises(RacError, match="7 models are too many"):
        plot_divergence([divergence_result()] * 7, tmp_path / "plot.png")
    with pytest.raises(RacError, match=r"plot\.txt.*\.png, \.svg, \.pdf"):
        plot_divergence(results, tmp_path / "plot.txt")


def test_bars_are_accuracy_with_its_interval_and_the_unfinished_share(drawn):
    results = [result([row()]), result([row(), row(correct=False, kind="going")], label="RAC")]
    plot_bars(results, "bars.png")
    left, right = drawn.figure.axes
    bars, interval = left.containers
    assert [bar.get_width() for bar in bars] == [100.0, 50.0]
    assert [bar.get_width() for bar in right.patches] == [0.0, 50.0]
    assert [text.get_text() for text in left.texts] == ["100.0%", "50.0%"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["dense", "RAC"]
    ends = [segment[:, 0].tolist() for segment in interval.lines[2][0].get_segments()]
    assert ends == [pytest.approx([100 * r.ci_low, 100 * r.ci_high]) for r in results]
    assert left.get_ylim()[0] > left.get_ylim()[1]  # the first model is at the top
    assert right.get_title(loc="left") == "Not finished within 64 tokens"


def test_bars_are_written_at_one_cap_only(tmp_path):
    results = [result([row()]), result([row()], cap=128)]
    assert plot_bars(results[:1], tmp_path / "bars.png").stat().st_size > 4000
    with pytest.raises(RacError, match=r"one cap, these have \[64, 128\]"):
        plot_bars(results, tmp_path / "bars.png")
    with pytest.raises(RacError, match="none"):
        plot_bars([], tmp_path / "bars.png")


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_bars([result([row()])], "p.png"),
        lambda: plot_divergence([divergence_result()], "p.png"),
        lambda: plot_file("p.png"),  # what `rac eval --plot` calls before it loads a model
    ],
)
def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch, draw):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RacError, match=r"rac-modifier\[eval\]"):
        draw()
