"""Draw docs/accuracy.png from results/accuracy_calibration.json and accuracy_presets.json."""

import json
from pathlib import Path
from typing import Any

import altair as alt

from bench.common import RESULTS, ROOT

# calibration set and preset: label and colour
LINES = {
    ("prompts", "paper"): ("prompts without the thinking, paper", "#9a9a9a"),
    ("generic", "paper"): ("generic text, paper", "#d98c3f"),
    ("traces", "paper"): ("own thinking (RAC), paper", "#3f7fbf"),
    ("traces", "quality"): ("own thinking (RAC), quality", "#1d4f8a"),
}
PATTERNS = ["50%", "60%", "70%", "80%", "2:4"]


def points() -> list[dict[str, Any]]:
    """Return a point per line, pattern and figure, with its lowest and highest value."""
    rows = {}  # of both tables, which share some
    for file in ("accuracy_presets", "accuracy_calibration"):  # the latter has three seeds
        for pattern, *line, _, right, truncated in read(file):
            if line[0]:
                rows[pattern, *line] = {"right": right, "truncated": truncated}
    return [
        {"line": LINES[calibration, preset][0], "pattern": pattern, "figure": figure}
        | dict(zip(("median", "low", "high"), limits(value), strict=True))
        for (pattern, preset, calibration), figures in rows.items()
        for figure, value in figures.items()
    ]


def limits(value: Any) -> list[float]:
    """Return a value with its lowest and highest one; a single value is all three."""
    return value if isinstance(value, list) else [value] * 3


def read(file: str) -> list[Any]:
    """Return the rows of a result."""
    rows: list[Any] = json.loads((RESULTS / f"{file}.json").read_text())["rows"]
    return rows


def draw(path: Path) -> None:
    """Write the figure: right answers on the left, truncated answers on the right."""

    def panel(figure: str, title: str) -> Any:
        labels, colours = zip(*LINES.values(), strict=True)
        scale = alt.Scale(domain=labels, range=colours)
        data = alt.Data(values=[point for point in points() if point["figure"] == figure])
        flat = alt.Axis(labelAngle=0)
        base = alt.Chart(data, title=title, width=380, height=240).encode(
            x=alt.X("pattern:N", sort=PATTERNS, title="pruned weights", axis=flat),
            color=alt.Color("line:N", title=None, scale=scale, legend=alt.Legend(columns=2)),
        )
        y = alt.Y("median:Q", title=None, scale=alt.Scale(domain=[0, 100]))
        line = base.mark_line().encode(y=y).transform_filter("datum.pattern != '2:4'")
        interval = base.mark_rule().encode(y="low:Q", y2="high:Q")
        return line + interval + base.mark_point(filled=True, size=40, opacity=1).encode(y=y)

    charts = panel("right", "right answers, %") | panel("truncated", "truncated answers, %")
    charts = charts.configure_view(stroke=None)
    charts.configure_legend(orient="bottom", labelLimit=300).save(path, ppi=150)


if __name__ == "__main__":
    draw(ROOT / "docs" / "accuracy.png")
