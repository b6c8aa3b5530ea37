"""The charts' specifications: what they show, and which rows no other row beats."""

import pytest

from rac_modifier.frontier.charts import AXES, _points, charts
from tests.frontier.sample import ROWS, row

MB, MATRICES, SPEED = AXES
EXPERTS = {"kept": {"model.layers.1.mlp": [0, 2]}, "saliency": {"model.layers.1.mlp": [3, 1, 2]}}
START = {"row": "50 %", "axis": MB, "find": ""}


def rows():
    return [
        row(*values)
        | {
            "interval": [values[3], values[3] - 0.05, values[3] + 0.05],
            "endings": [{"kind": kind} for kind in ("right", "right", "looping", "going")],
        }
        for values in ROWS
    ]


def values_of(spec):
    """All values of the data of a chart and its layers."""
    own = spec.get("data", {}).get("values", [])
    return own + [value for layer in spec.get("layer", []) for value in values_of(layer)]


def test_the_rows_that_no_other_row_beats():
    """Fewer MB and more accuracy: 50 % and 2:4 are beaten; against speed the faster row wins."""
    drawn = _points(rows(), lambda row: row["interval"], 1)

    def front(axis):
        return [p["label"][:9] for p in drawn if p["axis"] == axis and p["front"]]

    assert front(MB) == front(MATRICES) == ["dense", "50 % + in", "GPTQ int4", "GPTQ int2"]
    assert front(SPEED) == ["50 %"]
    (fifty,) = [p for p in drawn if p["axis"] == MATRICES and p["label"] == "50 %"]
    assert (fifty["x"], fifty["y"], fifty["low"]) == (4.5, 0.85, pytest.approx(0.8))


@pytest.mark.parametrize(
    ("places", "better", "front"),
    [
        ([(1, 1), (2, 1), (1, 2), (3, 3), (3, 3), (4, 3)], 1, [(1, 2), (3, 3), (3, 3)]),
        ([(1, 1), (2, 1), (1, 2)], -1, [(1, 1)]),
    ],
)
def test_a_row_that_is_equal_in_one_direction_and_better_in_the_other_beats(places, better, front):
    made = [row("x", "g", x, 0.5, None) | {"y": y} for x, y in places]
    drawn = _points(made, lambda row: [row["y"]] * 3, better)
    assert [(p["x"], p["y"]) for p in drawn if p["axis"] == MB and p["front"]] == front


def test_the_intervals_and_endings_of_each_row():
    specs = charts(rows(), {"dense": [], "rows": {}}, START)
    accuracy, kl, stopping = specs.values()
    assert {v["label"] for v in values_of(accuracy)} == {label for label, *_ in ROWS}
    shown = {v["label"]: v for v in values_of(kl) if v["axis"] == MB}
    assert "dense" not in shown
    assert shown["50 %"]["high"] == pytest.approx(0.01 + 1.96 * 0.001)
    assert all(0 < v["low"] <= v["y"] for v in shown.values())
    shares = {v["kind"]: v["share"] for v in values_of(stopping) if v["label"] == "2:4"}
    assert shares == {
        "right": 0.5,
        "wrong": 0.0,
        "truncated: had the answer": 0.0,
        "truncated: looping": 0.25,
        "truncated: going": 0.25,
    }
    bare = [row | {"interval": None, "endings": []} for row in rows()]
    without = charts(bare, {"dense": [], "rows": {}}, START)
    assert [caption.partition(",")[0] for caption in without] == [
        "KL from the dense model",
    ]
    for spec in specs.values():
        assert {p["name"]: p.get("value") for p in spec["params"]}.items() >= START.items()


def test_a_point_per_problem_has_the_tokens_of_both_answers():
    dense = [{"id": f"p{i}", "tokens": 10 + i} for i in range(3)]
    own = [{"kind": "looping", "tokens": 50}, {"kind": None, "tokens": 7}]
    specs = charts(rows(), {"dense": dense, "rows": {"2:4": own}}, START)
    (spec,) = [spec for caption, spec in specs.items() if caption.startswith("Tokens per answer")]
    problems = [v for v in values_of(spec) if "problem" in v]
    assert [(v["problem"], v["dense"], v["tokens"]) for v in problems] == [(0, 10, 50), (1, 11, 7)]
    assert [v["kind"] for v in problems] == ["truncated: looping", "not graded"]
    assert {"at": 50} in values_of(spec)


def test_each_expert_is_kept_or_removed():
    drawn = charts([rows()[1] | {"experts_removed": EXPERTS}], {"dense": [], "rows": {}}, START)
    (spec,) = [spec for caption, spec in drawn.items() if caption.startswith("Experts")]
    shown = [(v["expert"], v["saliency"], v["outcome"]) for v in values_of(spec)]
    assert shown == [(0, 3, "kept"), (1, 1, "removed"), (2, 2, "kept")]
