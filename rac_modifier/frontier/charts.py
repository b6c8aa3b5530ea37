"""The charts of a frontier as Vega-Lite specifications, which the page draws with Vega-Embed.

All charts have the parameters row, axis and find, so that a control is set in each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from rac_modifier.evaluation.stopping import KINDS

# What the horizontal axis shows: value of a row, and whether more is better.
AXES: dict[str, tuple[Any, bool]] = {
    "MB of the checkpoint": (lambda row: row["bytes"]["total"] / 1e6, False),
    "MB without head and embeddings": (lambda row: row["bytes"]["matrices"] / 1e6, False),
    "tokens per second": (lambda row: (row["served"] or {}).get("tokens_per_second"), True),
}
KIND_NAMES = {
    "right": "right",
    "wrong": "wrong",
    "reached": "truncated: had the answer",
    "looping": "truncated: looping",
    "going": "truncated: going",
}
# The palette of Okabe and Ito, which differs for every common colour blindness.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
_KIND_COLOURS = ["#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999"]
_MATCHES = "indexof(lower(datum.label), lower(find)) >= 0"
_HEIGHT = 280  # pixels


def charts(
    rows: Sequence[Mapping[str, Any]], traces: Mapping[str, Any], start: Mapping[str, str]
) -> dict[str, Any]:
    """Return specifications by caption; `start` holds the parameters of the opened page."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    drawn = {
        "Accuracy": _against(_points(rows, lambda row: row["interval"], 1), groups, "%", log=False),
        "KL from the dense model, nats per token": _against(
            _points(rows, _kl, -1), groups, ".2~g", log=True
        ),
        "How answers end": _stopping(rows),
        "Tokens per answer: the chosen row against the dense model": _tokens(traces),
        "Experts of the chosen row, by layer and saliency (REAP)": _experts(rows),
    }
    parameters = [alt.param(name=name, value=value) for name, value in start.items()]
    legend = {"orient": "bottom", "columns": 2, "labelLimit": 160, "title": None}
    return {
        caption: chart.add_params(*parameters)
        .properties(width="container")
        .configure(legend=legend, axis=alt.AxisConfig(labelLimit=130))
        .to_dict()
        for caption, chart in drawn.items()
        if chart is not None
    }


def _kl(row: Mapping[str, Any]) -> list[float] | None:
    divergence = row["divergence"]
    if divergence is None:
        return None
    kl, error = max(divergence["kl"], 1e-9), 1.96 * (divergence["kl_stderr"] or 0.0)
    # an interval that reaches zero has no end on a logarithmic axis
    return [kl, max(kl - error, kl / 10), kl + error]


def _points(rows: Sequence[Mapping[str, Any]], value: Any, better: int) -> list[dict[str, Any]]:
    """Return a point per row and axis; `value` gives [mean, low, high]; `better` is 1 or -1."""
    shown = []
    for axis, (place, more) in AXES.items():
        on_axis = [
            {"label": row["label"], "group": row["group"], "axis": axis, "x": place(row)}
            | dict(zip(("y", "low", "high"), value(row), strict=True))
            | {"bits": row["bytes"]["bits_per_weight"]}
            for row in rows
            if value(row) is not None and place(row) is not None
        ]
        places = [(p["x"] if more else -p["x"], better * p["y"]) for p in on_axis]
        for point, (x, y) in zip(on_axis, places, strict=True):
            beaten = any(a >= x and b >= y and (a, b) != (x, y) for a, b in places)
            shown.append({**point, "front": not beaten})
    return shown


def _against(values: list[dict[str, Any]], groups: list[str], form: str, *, log: bool) -> Any:
    """Draw _points with intervals, and the line of the rows that no other row beats."""
    if not values:
        return None
    picked = alt.selection_point(fields=["group"], bind="legend")
    base = alt.Chart(alt.Data(values=values)).transform_filter(f"datum.axis == axis && {_MATCHES}")
    linear = alt.Scale(zero=False, padding=12)
    scale = alt.Scale(type="log", padding=12) if log else linear
    base = base.encode(
        x=alt.X("x:Q", title=None, scale=linear),
        y=alt.Y("y:Q", title=None, scale=scale, axis=alt.Axis(format=form, tickCount=6)),
        opacity=alt.condition(picked, alt.value(1), alt.value(0.1)),
    )
    front = base.mark_line(strokeDash=[4, 3], color="#888888").transform_filter("datum.front")
    interval = base.mark_rule(color="#888888").encode(alt.Y("low:Q"), alt.Y2("high:Q"))
    colour = alt.Color("group:N", scale=alt.Scale(domain=groups, range=COLOURS))
    marks = base.mark_point(filled=True, cursor="pointer").encode(
        color=colour,
        shape=alt.Shape("group:N", scale=alt.Scale(domain=groups)),
        size=alt.condition("datum.label == row", alt.value(180), alt.value(80)),
        tooltip=[
            alt.Tooltip("label:N", title="row"),
            alt.Tooltip("group:N"),
            alt.Tooltip("x:Q", title="x", format=",.4~g"),
            alt.Tooltip("y:Q", title="value", format=".4~g"),
            alt.Tooltip("low:Q", title="95 % from", format=".4~g"),
            alt.Tooltip("high:Q", title="to", format=".4~g"),
            alt.Tooltip("bits:Q", title="bits per weight", format=".2f"),
        ],
    )
    names = base.mark_text(align="left", dx=8, dy=-8, color="#888888", limit=140).encode(
        text="label:N"
    )
    names = names.transform_filter("datum.front || datum.label == row")
    zoom = alt.selection_interval(bind="scales")
    return alt.layer(front, interval, marks.add_params(picked, zoom), names, height=_HEIGHT)


def _stopping(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the share of answers by kind of ending, a bar per graded row."""
    values = []
    for row in rows:
        endings = [ending["kind"] for ending in row["endings"]]
        for place, kind in enumerate(KINDS if endings else ()):
            share = endings.count(kind) / len(endings)
            name = {"label": row["label"], "kind": KIND_NAMES[kind]}
            values.append({**name, "share": share, "place": place})
    if not values:
        return None
    return (
        alt.Chart(alt.Data(values=values), height=22 * len(values) // len(KINDS))
        .transform_filter(_MATCHES)
        .mark_bar(cursor="pointer")
        .encode(
            x=alt.X("share:Q", title=None, axis=alt.Axis(format="%")),
            y=alt.Y("label:N", title=None, sort=None),
            color=_kind_colour(),
            order="place:O",
            tooltip=["label:N", "kind:N", alt.Tooltip("share:Q", format=".1%")],
        )
    )


def _kind_colour() -> Any:
    names = list(KIND_NAMES.values())
    return alt.Color("kind:N", scale=alt.Scale(domain=names, range=_KIND_COLOURS))


def _tokens(traces: Mapping[str, Any]) -> Any:
    """Draw a point per problem: tokens of the compressed answer over tokens of the dense one."""
    values = [
        {
            "label": label,
            "problem": number,
            "id": dense["id"],
            "dense": dense["tokens"],
            "tokens": answer["tokens"],
            "kind": KIND_NAMES.get(answer["kind"], "not graded"),
        }
        for label, answers in traces["rows"].items()
        for number, (dense, answer) in enumerate(zip(traces["dense"], answers, strict=False))
    ]
    if not values:
        return None
    most = max(max(v["dense"], v["tokens"]) for v in values)
    diagonal = alt.Chart(alt.Data(values=[{"at": 0}, {"at": most}])).mark_line(color="#888888")
    marks = (
        alt.Chart(alt.Data(values=values))
        .transform_filter("datum.label == row")
        .mark_point(filled=True, opacity=0.6, cursor="pointer")
        .encode(
            x=alt.X("dense:Q", title="tokens of the dense model", scale=alt.Scale(padding=12)),
            y=alt.Y("tokens:Q", title="tokens of the chosen row", scale=alt.Scale(padding=12)),
            color=_kind_colour(),
            tooltip=["id:N", "kind:N", "dense:Q", "tokens:Q"],
        )
        .add_params(alt.selection_interval(bind="scales"))
    )
    return alt.layer(diagonal.encode(x="at:Q", y="at:Q"), marks, height=_HEIGHT)


def _experts(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the saliency of every expert of a row, kept or removed."""
    values = [
        {
            "label": row["label"],
            "layer": number,
            "expert": expert,
            "saliency": saliency,
            "outcome": "kept" if expert in set(removed["kept"][layer]) else "removed",
        }
        for row in rows
        if (removed := row.get("experts_removed"))
        for number, layer in enumerate(removed["kept"])
        for expert, saliency in enumerate(removed["saliency"][layer])
    ]
    if not values:
        return None
    outcomes = alt.Scale(domain=["kept", "removed"], range=COLOURS)
    return (
        alt.Chart(alt.Data(values=values), height=_HEIGHT)
        .transform_filter("datum.label == row")
        .mark_point(filled=True, opacity=0.7)
        .encode(
            x=alt.X("layer:O", title="layer with experts", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("saliency:Q", title=None),
            color=alt.Color("outcome:N", scale=outcomes),
            shape=alt.Shape("outcome:N", scale=alt.Scale(domain=["kept", "removed"])),
            tooltip=["expert:N", "layer:O", "outcome:N", alt.Tooltip("saliency:Q", format=".3~g")],
        )
    )
