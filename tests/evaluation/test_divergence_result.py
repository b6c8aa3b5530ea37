import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.evaluation.divergence_result import (
    DivergenceResult,
    TokenDivergence,
    mean_over_tokens,
    summarise_divergence,
)
from rac_modifier.evaluation.plot import plot_divergence
from rac_modifier.evaluation.report import render_divergence_table

values = st.floats(0, 50)
rows_of_any_length = st.lists(st.lists(values, min_size=1, max_size=40), min_size=1, max_size=8)


def result(rows=((0.5, 0.1, 0.3), (0.2,)), label="2:4, RAC", bins=2):
    return summarise_divergence(
        [TokenDivergence(row, [k < 0.25 for k in row]) for row in rows], label=label, bins=bins, seconds=1.5
    )


def test_summary():
    found = result()
    assert (found.sequences, found.tokens) == (2, 4)
    assert found.kl == pytest.approx(1.1 / 4)
    assert found.agreement == 0.5
    assert [(b.start, b.end, b.sequences, b.tokens) for b in found.bins] == [(0, 2, 2, 3), (2, 4, 1, 1)]
    assert [b.kl for b in found.bins] == pytest.approx([0.8 / 3, 0.3])
    assert [b.agreement for b in found.bins] == pytest.approx([2 / 3, 0.0])
    assert found.bins[0].kl_stderr > 0
    assert found.bins[1].kl_stderr is None  # one completion reaches it


@given(rows_of_any_length, st.integers(1, 20))
def test_bins_partition_the_tokens(rows, bins):
    found = result(rows, bins=bins)
    assert 1 <= len(found.bins) <= bins
    assert sum(b.tokens for b in found.bins) == found.tokens == sum(map(len, rows))
    assert len({b.end - b.start for b in found.bins}) == 1
    assert [b.start for b in found.bins[1:]] == [b.end for b in found.bins[:-1]]
    for name in ("kl", "agreement"):
        total = math.fsum(b.tokens * getattr(b, name) for b in found.bins)
        assert total / found.tokens == pytest.approx(getattr(found, name))


@given(st.lists(st.tuples(values, values, values), min_size=2, max_size=9))
def test_the_error_of_rows_of_one_length_is_that_of_their_means(rows):
    mean, error = mean_over_tokens(rows)
    means = [statistics.fmean(row) for row in rows]
    assert mean == pytest.approx(statistics.fmean(means))
    assert error == pytest.approx(statistics.stdev(means) / math.sqrt(len(means)), abs=1e-9)


def test_tokens_of_a_row_that_err_together_count_as_one():
    """A naive error over tokens would be ten times smaller."""
    _, error = mean_over_tokens([[0.0] * 100, [1.0] * 100, [0.0] * 100, [1.0] * 100])
    assert error == pytest.approx(statistics.stdev([0, 1, 0, 1]) / 2)
    assert mean_over_tokens([[1.0, 2.0]]) == (1.5, None)


def test_results_survive_json():
    found = result()
    assert DivergenceResult.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_fields_of_another_version_are_named():
    with pytest.raises(RacError, match=r"not a divergence result .*'nats'"):
        DivergenceResult.from_dict(result().as_dict() | {"nats": 3})
    without = result().as_dict()
    del without["kl"]
    with pytest.raises(RacError, match=r"not a divergence result .*'kl'"):
        DivergenceResult.from_dict(without)


def test_table():
    table = render_divergence_table([result(), result(((0.25, 0.75), (0.5, 0.5)), "prompts|only")][:1])
    header, line, _, note = table.splitlines()
    assert header.split("  ")[0] == "model"
    assert line.split("  ")[0] == "2:4, RAC"
    assert "0.275 ± 0.03" in line
    assert "50.0% ± " in line
    assert note.startswith("KL(dense || model) on 4 completion tokens of 2 sequences")
    single = render_divergence_table([result(((0.5,),), "a|b")], markdown=True)
    assert "±" not in single.splitlines()[2]  # no error of one sequence
    assert r"a\|b" in single


@pytest.mark.parametrize("show", [render_divergence_table, lambda results: plot_divergence(results, "plot.png")])
def test_results_on_other_sequences_are_refused_side_by_side(show, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RacError, match="no divergence results"):
        show([])
    with pytest.raises(RacError, match=r"different sequences or bins .*a: 4 tokens of 2 sequences, b: 1 tokens"):
        show([result(label="a"), result(((0.5,),), "b")])
    with pytest.raises(RacError, match="different sequences or bins"):
        show([result(label="a"), result(label="b", bins=3)])


def test_plot(tmp_path):
    import matplotlib

    results = [result(label="RAC"), result(((0.9, 1.1, 2.0), (0.8,)), "prompts only")]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = plot_divergence(results, tmp_path / "new" / "plot.svg", title="at 60 %").read_text()
    for word in ("RAC", "prompts only", "position in the completion, tokens", "at 60 %", "KL to the dense model"):
        assert word in text, word
    with pytest.raises(RacError, match="7 models are too many"):
        plot_divergence([result()] * 7, tmp_path / "plot.png")
    with pytest.raises(RacError, match=r"plot\.txt"):
        plot_divergence(results, tmp_path / "plot.txt")
