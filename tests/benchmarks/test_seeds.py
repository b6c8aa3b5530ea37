"""The plots and tables of repeated runs, which the benchmarks share."""

import pytest

from benchmarks.seeds import column_positions, parse_sparsity, plot_accuracy, summarise_seeds
from rac_modifier.errors import RacError
from tests.evaluation.drawn import drawn as drawn

ROWS = [
    {"sparsity": s, "calibration": c, "accuracy": a, "unfinished_share": 1 - a}
    for c in ("generic", "prompts", "RAC")
    for s, a in ((0.5, 0.9), (0.5, 0.8), (0.6, 0.4), ("2:4", 0.7))
]


def seed_row(sparsity, calibration, accuracy, **more):
    return {"sparsity": sparsity, "calibration": calibration, "accuracy": accuracy} | more


def test_seeds_are_summarised_by_sparsity_and_calibration():
    rows = [
        seed_row("2:4", "RAC", 0.9),
        seed_row(0.6, "RAC", 0.8, unfinished_share=0.1, mean_thinking_tokens=30),
        seed_row(0.5, "RAC", 0.9),
        seed_row(0.5, "prompts", 0.3),
        seed_row("0.6", "RAC", 0.4, unfinished_share=0.3, mean_thinking_tokens=50),
    ]
    summaries = summarise_seeds(rows)
    assert [(s.sparsity, s.calibration, s.seeds) for s in summaries] == [
        (0.5, "RAC", 1),
        (0.5, "prompts", 1),
        (0.6, "RAC", 2),
        ("2:4", "RAC", 1),
    ]
    accuracy = summaries[2].accuracy
    assert (accuracy.mean, accuracy.low, accuracy.high) == pytest.approx((0.6, 0.4, 0.8))
    assert summaries[2].unfinished_share.mean == pytest.approx(0.2)
    assert summaries[2].mean_thinking_tokens.high == 50
    assert summaries[0].unfinished_share is None


def test_the_mean_of_equal_values_is_that_value():
    """0.1 + 0.1 + 0.1 rounds up, and the mean with it."""
    accuracy = summarise_seeds([seed_row(0.5, "RAC", 0.1)] * 3)[0].accuracy
    assert (accuracy.mean, accuracy.low, accuracy.high) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"sparsity": 0.5, "accuracy": 1.0}], "no calibration"),
        ([seed_row(50, "RAC", 1.0)], 'sparsity 50 .*use 0.5 or "2:4"'),
        ([seed_row("half", "RAC", 1.0)], "'half'"),
        (
            [seed_row(0.5, "RAC", 1.0), seed_row(0.5, "RAC", 1.0, unfinished_share=0.1)],
            "1 of 2 .*unfinished_share",
        ),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(RacError, match=message):
        summarise_seeds(rows)


def test_sparsity():
    assert parse_sparsity("0.5") == 0.5
    assert parse_sparsity("2:4") == "2:4"


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot_is_written(tmp_path, suffix):
    path = plot_accuracy(
        ROWS, 0.99, tmp_path / "new" / f"plot.{suffix}", dense_unfinished=0.01, title="t"
    )
    assert path.stat().st_size > 4000


def test_plot_shows_every_set_pattern_and_dense(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot_accuracy(ROWS, 0.99, tmp_path / "plot.svg").read_text()
    for word in ("generic", "prompts", "RAC", "dense", "2:4", "50%", "60%", "Unfinished"):
        assert f">{word}<" in text or word in text, word


def test_points_are_means_and_bars_reach_to_the_extremes(drawn):
    rows = [seed_row(0.5, "RAC", a, unfinished_share=0.25) for a in (0.5, 0.75, 1.0)]
    plot_accuracy(rows, 0.99, "plot.png")
    (container,) = drawn.figure.axes[0].containers
    line, _, (bars,) = container.lines
    assert line.get_ydata().tolist() == [75.0]
    assert bars.get_segments()[0][:, 1].tolist() == [50.0, 100.0]


@pytest.mark.parametrize("rows", [ROWS[:1], [ROWS[3]], ROWS[:4]])
def test_few_points_suffice(tmp_path, rows):
    assert plot_accuracy(rows, 0.99, tmp_path / "plot.png").exists()


def test_patterns_stand_to_the_right_of_all_shares():
    positions = column_positions(["2:4", 0.6, 0.5, "4:8", 0.5])
    assert list(positions) == [0.5, 0.6, "2:4", "4:8"]
    assert list(positions.values()) == pytest.approx([0.5, 0.6, 0.7, 0.8])


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        (ROWS, "plot.txt", r"plot.txt.*\.png, \.svg, \.pdf"),
        ([], "plot.png", "no rows"),
        (
            [{"sparsity": 0.5, "calibration": "RAC", "accuracy": 1.0}],
            "plot.png",
            "unfinished_share",
        ),
        ([ROWS[0] | {"calibration": str(i)} for i in range(7)], "plot.png", "7 calibration sets"),
    ],
)
def test_bad_input(tmp_path, rows, name, message):
    with pytest.raises(RacError, match=message):
        plot_accuracy(rows, 0.99, tmp_path / name)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RacError, match=r"rac-modifier\[eval\]"):
        plot_accuracy(ROWS, 0.99, tmp_path / "plot.png")
