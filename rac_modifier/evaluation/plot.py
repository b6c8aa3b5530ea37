"""Plots of `rac eval --plot`: accuracy as bars, or divergence from the dense model by position."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rac_modifier.errors import RacError
from rac_modifier.evaluation.report import check_same_sequences

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rac_modifier.evaluation.divergence import DivergenceResult
    from rac_modifier.evaluation.results import EvalResult

# The palette of Okabe and Ito, which differs for every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, MUTED = "#222222", "#666666"
_FORMATS = (".png", ".svg", ".pdf")


def plot_bars(results: Sequence[EvalResult], path: str | os.PathLike[str]) -> Path:
    """Draw accuracy with its 95 % interval, and the unfinished share, of a few models.

    Raises:
        RacError: no results, results at different caps, another file type than .png, .svg or .pdf,
            matplotlib missing.
    """
    path = plot_file(path)
    if not results or len({r.cap for r in results}) > 1:
        raise RacError(
            f"bars need results at one cap, these have {sorted({r.cap for r in results}) or 'none'}; "
            "evaluate all at one cap"
        )
    figure = new_figure(9.6, 0.8 + 0.45 * len(results))
    left, right = figure.subplots(1, 2, sharey=True)
    colours = [MUTED, *[COLOURS[0]] * (len(results) - 1)]
    shares = [r.accuracy for r in results]
    below = [100 * (r.accuracy - r.ci_low) for r in results]
    above = [100 * (r.ci_high - r.accuracy) for r in results]
    _bars(left, shares, colours, ends=[100 * r.ci_high for r in results])
    left.errorbar(
        [100 * s for s in shares],
        range(len(results)),
        xerr=[below, above],
        fmt="none",
        ecolor=INK,
        capsize=2.5,
    )
    _bars(
        right,
        [r.unfinished_share for r in results],
        colours,
        ends=[100 * r.unfinished_share for r in results],
    )
    left.set_yticks(range(len(results)), [r.label for r in results])
    left.invert_yaxis()
    left.set_title("Correct answers (95 % interval)", loc="left", fontsize=10, color=INK)
    right.set_title(
        f"Not finished within {results[0].cap} tokens", loc="left", fontsize=10, color=INK
    )
    figure.savefig(path)
    return path


def plot_divergence(results: Sequence[DivergenceResult], path: str | os.PathLike[str]) -> Path:
    """Draw KL to the dense model (left) and top-1 agreement (right) by position, a line per model.

    Shaded areas are one standard error. They show errors that accumulate while a model thinks: with
    calibration on prompts only, errors grow with the position (arXiv 2509.12464, figure 2).

    Raises:
        RacError: no results, results on different sequences, more results than colours, another file
            type than .png, .svg or .pdf, matplotlib missing.
    """
    path = plot_file(path)
    check_same_sequences(results)
    if len(results) > len(COLOURS):
        raise RacError(
            f"{len(results)} models are too many for one plot; show at most {len(COLOURS)}"
        )
    figure = new_figure(9.6, 4.0)
    left, right = figure.subplots(1, 2)
    for index, r in enumerate(results):
        positions = [(b.start + b.end) / 2 for b in r.bins]
        for axes, scale, means, errors in (
            (left, 1, [b.kl for b in r.bins], [b.kl_stderr for b in r.bins]),
            (right, 100, [b.agreement for b in r.bins], [b.agreement_stderr for b in r.bins]),
        ):
            style = {
                "color": COLOURS[index],
                "marker": MARKERS[index],
                "linewidth": 1.8,
                "markersize": 5,
            }
            axes.plot(positions, [scale * m for m in means], label=r.label, **style)
            low = [scale * (m - (e or 0.0)) for m, e in zip(means, errors, strict=True)]
            high = [scale * (m + (e or 0.0)) for m, e in zip(means, errors, strict=True)]
            axes.fill_between(positions, low, high, color=COLOURS[index], alpha=0.18, linewidth=0)
    left.set_title("KL to the dense model, nats per token", loc="left", fontsize=10, color=INK)
    right.set_title("Same most likely token as the dense model", loc="left", fontsize=10, color=INK)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}%")
    left.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("position in the completion, tokens", fontsize=9, color=INK)
        axes.set_xlim(0, results[0].bins[-1].end)
        plain_axes(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 4),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path)
    return path


def plain_axes(axes: Axes) -> None:
    """Draw horizontal grid lines, and only the bottom line of the frame."""
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def plot_file(path: str | os.PathLike[str]) -> Path:
    """Check the path of a plot, and create its folder.

    Raises:
        RacError: another file type than .png, .svg or .pdf, matplotlib missing.
    """
    path = Path(path)
    if importlib.util.find_spec("matplotlib") is None:
        raise RacError("plots need matplotlib; pip install 'rac-modifier[eval]'")
    if path.suffix.lower() not in _FORMATS:
        raise RacError(
            f"cannot write a plot to {str(path)!r}; use a name that ends in {', '.join(_FORMATS)}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, without pyplot, which would choose a backend."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def _bars(axes: Axes, shares: list[float], colours: list[str], ends: list[float]) -> None:
    """Draw horizontal bars with their values to the right of `ends`."""
    axes.barh(range(len(shares)), [100 * s for s in shares], color=colours, height=0.6)
    for y, (share, end) in enumerate(zip(shares, ends, strict=True)):
        axes.text(end + 2, y, f"{share:.1%}", va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 118)
    axes.set_xticks([])
    axes.tick_params(labelsize=9, colors=INK, length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
