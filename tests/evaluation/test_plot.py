import subprocess
import sys

import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation.plot import _positions, plot_accuracy, plot_bars
from tests.evaluation.test_results import result, row

ROWS = [
    {"sparsity": s, "calibration": c, "accuracy": a, "unfinished_share": 1 - a}
    for c in ("generic", "prompts", "RAC")
    for s, a in ((0.5, 0.9), (0.5, 0.8), (0.6, 0.4), ("2:4", 0.7))
]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot_is_written(tmp_path, suffix):
    path = plot_accuracy(ROWS, 0.99, tmp_path / "new" / f"plot.{suffix}", dense_unfinished=0.01, title="t")
    assert path.stat().st_size > 4000


def test_plot_shows_every_set_pattern_and_dense(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot_accuracy(ROWS, 0.99, tmp_path / "plot.svg").read_text()
    for word in ("generic", "prompts", "RAC", "dense", "2:4", "50%", "60%", "never end"):
        assert f">{word}<" in text or word in text, word


@pytest.mark.parametrize("rows", [ROWS[:1], [ROWS[3]], ROWS[:4]])
def test_few_points_suffice(tmp_path, rows):
    assert plot_accuracy(rows, 0.99, tmp_path / "plot.png").exists()


def test_patterns_stand_to_the_right_of_all_shares():
    positions = _positions(["2:4", 0.6, 0.5, "4:8", 0.5])
    assert list(positions) == [0.5, 0.6, "2:4", "4:8"]
    assert list(positions.values()) == pytest.approx([0.5, 0.6, 0.7, 0.8])


def test_bars(tmp_path):
    results = [result([row()]), result([row(), row(correct=False, finish="length")], label="RAC")]
    assert plot_bars(results, tmp_path / "bars.png").stat().st_size > 4000
    with pytest.raises(RacError, match=r"one cap; these have \[64, 128\]"):
        plot_bars([results[0], result([row()], cap=128)], tmp_path / "bars.png")
    with pytest.raises(RacError, match="none"):
        plot_bars([], tmp_path / "bars.png")


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        (ROWS, "plot.txt", r"plot.txt.*\.png, \.svg, \.pdf"),
        ([], "plot.png", "no rows"),
        ([{"sparsity": 0.5, "calibration": "RAC", "accuracy": 1.0}], "plot.png", "unfinished_share"),
        ([ROWS[0] | {"calibration": str(i)} for i in range(7)], "plot.png", "7 calibration sets"),
    ],
)
def test_bad_input(tmp_path, rows, name, message):
    with pytest.raises(RacError, match=message):
        plot_accuracy(rows, 0.99, tmp_path / name)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RacError, match=r"rac-modifier\[eval\]"):
        plot_accuracy(ROWS, 0.99, tmp_path / "plot.png")


def test_importing_evaluation_loads_nothing_heavy():
    names = ["matplotlib", "math_verify", "datasets", "reasoning_gym", "llmcompressor", "vllm"]
    code = (
        "import sys, rac_modifier.problems.answers, rac_modifier.evaluation.plot\n"
        f"assert not [n for n in {[*names, 'torch']} if n in sys.modules]\n"
        "import rac_modifier.evaluation.accuracy, rac_modifier.problems.held_out\n"
        f"print([n for n in {names} if n in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr
