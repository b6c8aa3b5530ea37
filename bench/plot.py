"""Draw docs/accuracy.png from results/accuracy_calibration.json and accuracy_presets.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from bench.common import RESULTS, ROOT

# calibration set or preset: label and colour
LINES = {
    "prompts only": ("prompts without the thinking, paper", "#9a9a9a"),
    "generic text": ("generic text, paper", "#d98c3f"),
    "paper": ("own thinking (RAC), paper", "#3f7fbf"),
    "quality": ("own thinking (RAC), quality", "#1d4f8a"),
}
PATTERNS = ("50%", "60%", "70%", "80%", "2:4")
COLUMNS = ("right answers, %", "truncated answers, %")


def rows_by_line() -> dict[str, dict[str, Any]]:
    """Return, per line, the two [mean, lowest, highest] of each pattern."""
    lines: dict[str, dict[str, Any]] = {name: {} for name in LINES}
    for file in ("accuracy_calibration", "accuracy_presets"):
        for pattern, name, *values in json.loads((RESULTS / f"{file}.json").read_text())["rows"]:
            if name in lines:
                lines[name][pattern] = values
    return lines


def draw(path: Path) -> None:
    """Write the figure: right answers on the left, truncated answers on the right."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), sharex=True, constrained_layout=True)
    for number, (axes, title) in enumerate(zip(panels, COLUMNS, strict=True)):
        for name, values in rows_by_line().items():
            label, colour = LINES[name]
            patterns = [pattern for pattern in PATTERNS if pattern in values]
            places = [PATTERNS.index(pattern) for pattern in patterns]
            free = [place for place in places if PATTERNS[place] != "2:4"]
            means = {place: values[PATTERNS[place]][number] for place in places}
            axes.plot(free, [means[place][0] for place in free], color=colour, lw=1.6, label=label)
            for place, (mean, low, high) in means.items():
                error = [[mean - low], [high - mean]]
                axes.errorbar(place, mean, error, fmt="o", ms=4.5, color=colour, capsize=2.5, lw=1)
        axes.set_xticks(range(len(PATTERNS)), [text.replace("%", " %") for text in PATTERNS])
        axes.set_title(title, fontsize=10)
        axes.set_ylim(-3, 103)
        axes.grid(axis="y", color="#e4e4e4", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("pruned weights", fontsize=9)
        axes.tick_params(labelsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        fontsize=8,
        frameon=False,
        ncols=4,
        loc="outside lower center",
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw(ROOT / "docs" / "accuracy.png")
