import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation.report import parse_sparsity, render_seed_table, render_table, summarise_seeds
from tests.evaluation.test_results import result, row


def test_table_columns_line_up():
    table = render_table([result([row()]), result([row(), row(correct=False, finish="length")], label="2:4, RAC")])
    header, dense, pruned = table.splitlines()[:3]
    assert header.split("  ")[0] == "model"
    assert dense.startswith("dense     ")
    assert "50.0%" in pruned
    assert {line.index(cell) + len(cell) for line, cell in ((header, "accuracy"), (dense, "100.0%"))} == {
        pruned.index("50.0%") + 5
    }
    assert table.endswith("At most 64 new tokens a problem; greedy.")


def test_markdown_table_has_equally_many_cells_in_each_line():
    table = render_table([result([row()], label="a"), result([row()], label="long label")], markdown=True)
    lines = table.splitlines()[:4]
    assert {line.count("|") for line in lines} == {10}
    assert set(lines[1]) <= set("|-: ")
    assert r"| a\|b" in render_table([result([row()], label="a|b")], markdown=True)


def test_different_caps_are_refused_unless_asked_for():
    results = [result([row()]), result([row()], cap=128, temperature=0.6)]
    with pytest.raises(RacError, match=r"different caps \(64, 128 new tokens\).*allow_mixed_caps"):
        render_table(results)
    table = render_table(results, allow_mixed_caps=True)
    assert [line.split()[-1] for line in table.splitlines()[:3]] == ["cap", "64", "128"]
    assert "greedy, temperature 0.6" in table
    with pytest.raises(RacError, match="no results"):
        render_table([])


def seed_row(sparsity, calibration, accuracy, **more):
    return {"sparsity": sparsity, "calibration": calibration, "accuracy": accuracy} | more


def test_seeds_are_summarised_by_sparsity_and_calibration():
    rows = [
        seed_row("2:4", "RAC", 0.9),
        seed_row(0.6, "RAC", 0.8, unfinished_share=0.1),
        seed_row(0.5, "RAC", 0.9),
        seed_row(0.5, "prompts", 0.3),
        seed_row("0.6", "RAC", 0.4, unfinished_share=0.3),
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
    assert summaries[0].unfinished_share is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"sparsity": 0.5, "accuracy": 1.0}], "no calibration"),
        ([seed_row(50, "RAC", 1.0)], 'sparsity 50 .*use 0.5 or "2:4"'),
        ([seed_row("half", "RAC", 1.0)], "'half'"),
        ([seed_row(0.5, "RAC", 1.0), seed_row(0.5, "RAC", 1.0, unfinished_share=0.1)], "1 of 2 .*unfinished_share"),
    ],
)
def test_bad_rows(rows, message):
    with pytest.raises(RacError, match=message):
        summarise_seeds(rows)


def test_sparsity():
    assert parse_sparsity("0.5") == 0.5
    assert parse_sparsity("2:4") == "2:4"


def test_seed_table():
    dense = result([row()]).as_dict()
    rows = [seed_row("2:4", "RAC", a, cap=64, unfinished_share=0.0, mean_thinking_tokens=9) for a in (0.8, 0.9)]
    lines = render_seed_table(rows, dense).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["-", "dense", "100.0%", "0.0%", "8", "1"]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        *["2:4", "RAC", "85.0% (80.0-90.0)", "0.0%", "9", "2"]
    ]
    with pytest.raises(RacError, match="different caps"):
        render_seed_table([rows[0] | {"cap": 32}], dense)
