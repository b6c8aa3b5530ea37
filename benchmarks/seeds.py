"""Repeated runs of a benchmark as mean and range over seeds, and their plot by sparsity."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rac_modifier.errors import RacError
from rac_modifier.evaluation.plot import (
    COLOURS,
    INK,
    MARKERS,
    MUTED,
    new_figure,
    plain_axes,
    plot_file,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class SeedSummary:
    """All seeds of one sparsity and calibration set."""

    sparsity: float | str  # a share, or a pattern such as "2:4"
    calibration: str
    seeds: int
    accuracy: Spread
    unfinished_share: Spread | None  # None where the rows do not have it
    mean_thinking_tokens: Spread | None


def summarise_seeds(rows: Iterable[Mapping[str, Any]]) -> list[SeedSummary]:
    """Mean, lowest and highest over the rows of each (sparsity, calibration).

    Rows have `sparsity` (a share, or a pattern such as "2:4"), `calibration` and `accuracy`, one row per seed, and
    optionally `unfinished_share` and `mean_thinking_tokens`. Sorted by sparsity, patterns last; calibration sets keep
    the order in which they first appear.

    Raises:
        RacError: no rows, a row without a needed field, a sparsity that is neither, an optional field in some rows of
            a group only.
    """
    groups: dict[tuple[float | str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        missing = [name for name in ("sparsity", "calibration", "accuracy") if name not in row]
        if missing:
            raise RacError(
                f"a row has no {' and no '.join(missing)}: {dict(row)}; each row needs them"
            )
        groups.setdefault((parse_sparsity(row["sparsity"]), str(row["calibration"])), []).append(
            row
        )
    if not groups:
        raise RacError("no rows to summarise; give at least one")
    names = list(dict.fromkeys(calibration for _, calibration in groups))
    summaries = [
        SeedSummary(
            sparsity=sparsity,
            calibration=calibration,
            seeds=len(group),
            accuracy=_spread([float(row["accuracy"]) for row in group]),
            unfinished_share=_optional_spread(group, "unfinished_share"),
            mean_thinking_tokens=_optional_spread(group, "mean_thinking_tokens"),
        )
        for (sparsity, calibration), group in groups.items()
    ]
    return sorted(summaries, key=lambda s: (sparsity_order(s.sparsity), names.index(s.calibration)))


def parse_sparsity(value: float | str) -> float | str:
    """A share from 0 to 1 as a float, or a pattern such as "2:4" as it is."""
    if isinstance(value, str) and ":" in value:
        return value
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise RacError(
            f'sparsity {value!r} is neither a share from 0 to 1 nor a pattern; use 0.5 or "2:4"'
        )
    return share


def sparsity_order(sparsity: float | str) -> tuple[bool, float, str]:
    """Sort key: shares by size, then patterns by name."""
    return (True, 0.0, sparsity) if isinstance(sparsity, str) else (False, sparsity, "")


def _spread(values: list[float]) -> Spread:
    # fmean rounds: the mean of equal values must not leave their range.
    return Spread(min(max(fmean(values), min(values)), max(values)), min(values), max(values))


def _optional_spread(group: list[Mapping[str, Any]], name: str) -> Spread | None:
    values = [float(row[name]) for row in group if row.get(name) is not None]
    if values and len(values) < len(group):
        raise RacError(
            f"{len(group) - len(values)} of {len(group)} rows of sparsity {group[0]['sparsity']!r}, calibration "
            f"{group[0]['calibration']!r} have no {name}; give it in all of them or in none"
        )
    return _spread(values) if values else None


def plot_accuracy(
    rows: Iterable[Mapping[str, Any]],
    dense_accuracy: float,
    path: str | os.PathLike[str],
    *,
    dense_unfinished: float | None = None,
    title: str | None = None,
) -> Path:
    """Draw accuracy (left) and the share of unfinished answers (right) by sparsity, and return the file's path.

    Each point is the mean over seeds, its bar reaches from the lowest to the highest seed. Patterns such as 2:4 are not
    points on the axis of shares, so each has its own column at the right.

    Args:
        rows: as `summarise_seeds` takes them, all with `unfinished_share`.
        dense_accuracy: of the unpruned model, a share.
        path: ends in .png, .svg or .pdf.
        dense_unfinished: the unpruned model's share of unfinished answers, if known.
        title: above both panels.

    Raises:
        RacError: unusable rows (see `summarise_seeds`), more calibration sets than colours, another file type,
            matplotlib missing.
    """
    path = plot_file(path)
    summaries = summarise_seeds(rows)
    names = list(dict.fromkeys(s.calibration for s in summaries))
    if len(names) > len(COLOURS):
        raise RacError(
            f"{len(names)} calibration sets are too many for one plot; show at most {len(COLOURS)}"
        )
    if any(s.unfinished_share is None for s in summaries):
        raise RacError(
            "the second panel needs unfinished_share in every row; take it from the evaluation results"
        )

    figure = new_figure(9.6, 4.0)
    left, right = figure.subplots(1, 2)
    _panel(left, [(s, s.accuracy) for s in summaries], names, dense_accuracy)
    unfinished = [(s, s.unfinished_share) for s in summaries if s.unfinished_share is not None]
    _panel(right, unfinished, names, dense_unfinished)
    left.set_title("Correct answers", loc="left", fontsize=10, color=INK)
    right.set_title("Unfinished answers (cut off at the cap)", loc="left", fontsize=10, color=INK)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    figure.savefig(path)
    return path


def _panel(
    axes: Axes, points: list[tuple[SeedSummary, Spread]], names: list[str], dense: float | None
) -> None:
    """One panel: lines over shares, single markers over patterns, a dashed line for dense."""
    positions = column_positions([s.sparsity for s, _ in points])
    step = _smallest_gap(list(positions.values()))
    for index, name in enumerate(names):
        own = [(s.sparsity, spread) for s, spread in points if s.calibration == name]
        # Side by side, so that the bars of similar calibration sets do not hide each other.
        shift = (index - (len(names) - 1) / 2) * 0.1 * step
        label: str | None = name
        for is_pattern in (False, True):
            part = [(positions[x] + shift, y) for x, y in own if isinstance(x, str) == is_pattern]
            if part:
                axes.errorbar(
                    [x for x, _ in part],
                    [100 * y.mean for _, y in part],
                    yerr=[
                        [100 * (y.mean - y.low) for _, y in part],
                        [100 * (y.high - y.mean) for _, y in part],
                    ],
                    color=COLOURS[index],
                    marker=MARKERS[index],
                    linestyle="none" if is_pattern else "-",
                    linewidth=1.8,
                    markersize=6,
                    elinewidth=1.2,
                    capsize=2.5,
                    label=label,
                )
                label = None
    if dense is not None:
        axes.axhline(
            100 * dense, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.2, label="dense", zorder=0
        )
    axes.set_xticks(
        list(positions.values()),
        [x if isinstance(x, str) else f"{100 * x:.3g}%" for x in positions],
    )
    axes.set_xlabel("weights pruned in each layer", fontsize=9, color=INK)
    axes.set_ylim(-3, 103)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    plain_axes(axes)
    shares = [x for key, x in positions.items() if not isinstance(key, str)]
    patterns = [x for key, x in positions.items() if isinstance(key, str)]
    axes.set_xlim(min(positions.values()) - 0.5 * step, max(positions.values()) + 0.5 * step)
    if shares and patterns:
        axes.axvline((max(shares) + min(patterns)) / 2, color="#BBBBBB", linewidth=0.8)


def column_positions(sparsities: list[float | str]) -> dict[float | str, float]:
    """The horizontal position of each sparsity: shares at their value, each pattern in its own column to the right."""
    ordered = sorted(set(sparsities), key=sparsity_order)
    shares = [x for x in ordered if not isinstance(x, str)]
    patterns = [x for x in ordered if isinstance(x, str)]
    gap = (shares[-1] - shares[0]) / (len(shares) - 1) if len(shares) > 1 else 0.1
    start = shares[-1] if shares else 0.0
    return {x: x for x in shares} | {x: start + (i + 1) * gap for i, x in enumerate(patterns)}


def _smallest_gap(positions: list[float]) -> float:
    return min((b - a for a, b in itertools.pairwise(positions)), default=0.1)
