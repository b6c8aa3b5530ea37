"""Accuracy and unfinished answers by sparsity, dense as the reference; divergence from dense by position."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac_modifier.errors import RacError
from rac_modifier.evaluation.divergence_result import DivergenceResult
from rac_modifier.evaluation.report import SeedSummary, Spread, check_same_sequences, sparsity_order, summarise_seeds
from rac_modifier.evaluation.results import EvalResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart under every common colour blindness; markers carry the identity too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_FORMATS = (".png", ".svg", ".pdf")
_INK, _MUTED = "#222222", "#666666"


def plot_accuracy(
    rows: Iterable[Mapping[str, Any]],
    dense_accuracy: float,
    path: str | os.PathLike[str],
    *,
    dense_unfinished: float | None = None,
    title: str | None = None,
) -> Path:
    """Draw accuracy (left) and the share of answers that never end (right) by sparsity, and return the file's path.

    Each point is the mean over seeds, its bar reaches from the lowest to the highest seed. Patterns such as 2:4 have
    a column of their own at the right: they are no point on the axis of shares.

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
    path = _checked(path)
    summaries = summarise_seeds(rows)
    names = list(dict.fromkeys(s.calibration for s in summaries))
    if len(names) > len(_COLOURS):
        raise RacError(f"{len(names)} calibration sets are too many for one plot; show at most {len(_COLOURS)}")
    if any(s.unfinished_share is None for s in summaries):
        raise RacError("the second panel needs unfinished_share in every row; take it from the evaluation results")

    figure = _figure(9.6, 4.0)
    left, right = figure.subplots(1, 2)
    _panel(left, [(s, s.accuracy) for s in summaries], names, dense_accuracy)
    unfinished = [(s, s.unfinished_share) for s in summaries if s.unfinished_share is not None]
    _panel(right, unfinished, names, dense_unfinished)
    left.set_title("Correct answers", loc="left", fontsize=10, color=_INK)
    right.set_title("Answers that never end (cut off at the cap)", loc="left", fontsize=10, color=_INK)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    figure.savefig(path)
    return path


def plot_bars(results: Sequence[EvalResult], path: str | os.PathLike[str]) -> Path:
    """Draw accuracy with its 95 % interval and the unfinished share of a few models as bars, the first as reference.

    Raises:
        RacError: no results, results at different caps, another file type than .png, .svg or .pdf, matplotlib missing.
    """
    path = _checked(path)
    if not results or len({r.cap for r in results}) > 1:
        raise RacError(f"bars need results at one cap; these have {sorted({r.cap for r in results}) or 'none'}")
    figure = _figure(9.6, 0.8 + 0.45 * len(results))
    left, right = figure.subplots(1, 2, sharey=True)
    colours = [_MUTED, *[_COLOURS[0]] * (len(results) - 1)]
    shares = [r.accuracy for r in results]
    below = [100 * (r.accuracy - r.ci_low) for r in results]
    above = [100 * (r.ci_high - r.accuracy) for r in results]
    _bars(left, shares, colours, ends=[100 * r.ci_high for r in results])
    left.errorbar(
        [100 * s for s in shares], range(len(results)), xerr=[below, above], fmt="none", ecolor=_INK, capsize=2.5
    )
    _bars(right, [r.unfinished_share for r in results], colours, ends=[100 * r.unfinished_share for r in results])
    left.set_yticks(range(len(results)), [r.label for r in results])
    left.invert_yaxis()
    left.set_title("Correct answers (95 % interval)", loc="left", fontsize=10, color=_INK)
    right.set_title(f"Never end within {results[0].cap} tokens", loc="left", fontsize=10, color=_INK)
    figure.savefig(path)
    return path


def plot_divergence(
    results: Sequence[DivergenceResult], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Draw KL to the dense model (left) and top-1 agreement with it (right) by position in the completion, a line a model.

    Shades are one standard error. What accumulates while a model thinks shows here: calibrated on prompts only, the error
    grows with the position (arXiv 2509.12464, figure 2, shows it for the error of layers).

    Raises:
        RacError: no results, results on different sequences, more of them than colours, another file type than .png, .svg or
            .pdf, matplotlib missing.
    """
    path = _checked(path)
    check_same_sequences(results)
    if len(results) > len(_COLOURS):
        raise RacError(f"{len(results)} models are too many for one plot; show at most {len(_COLOURS)}")
    figure = _figure(9.6, 4.0)
    left, right = figure.subplots(1, 2)
    for index, r in enumerate(results):
        positions = [(b.start + b.end) / 2 for b in r.bins]
        for axes, scale, means, errors in (
            (left, 1, [b.kl for b in r.bins], [b.kl_stderr for b in r.bins]),
            (right, 100, [b.agreement for b in r.bins], [b.agreement_stderr for b in r.bins]),
        ):
            style = {"color": _COLOURS[index], "marker": _MARKERS[index], "linewidth": 1.8, "markersize": 5}
            axes.plot(positions, [scale * m for m in means], label=r.label, **style)
            low = [scale * (m - (e or 0.0)) for m, e in zip(means, errors, strict=True)]
            high = [scale * (m + (e or 0.0)) for m, e in zip(means, errors, strict=True)]
            axes.fill_between(positions, low, high, color=_COLOURS[index], alpha=0.18, linewidth=0)
    left.set_title("KL to the dense model, nats a token", loc="left", fontsize=10, color=_INK)
    right.set_title("Same most likely token as the dense model", loc="left", fontsize=10, color=_INK)
    right.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}%")
    left.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("position in the completion, tokens", fontsize=9, color=_INK)
        axes.set_xlim(0, results[0].bins[-1].end)
        _plain(axes)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=_INK)
    figure.savefig(path)
    return path


def _plain(axes: Axes) -> None:
    """Horizontal grid lines and no frame but the bottom one."""
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=_INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _bars(axes: Axes, shares: list[float], colours: list[str], ends: list[float]) -> None:
    """Horizontal bars, each with its value written behind `ends`."""
    axes.barh(range(len(shares)), [100 * s for s in shares], color=colours, height=0.6)
    for y, (share, end) in enumerate(zip(shares, ends, strict=True)):
        axes.text(end + 2, y, f"{share:.1%}", va="center", fontsize=9, color=_INK)
    axes.set_xlim(0, 118)
    axes.set_xticks([])
    axes.tick_params(labelsize=9, colors=_INK, length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _checked(path: str | os.PathLike[str]) -> Path:
    """The path of a plot that can be written, its folder made."""
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise RacError(f"cannot write a plot to {str(path)!r}; end the name in {', '.join(_FORMATS)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; without pyplot, which would keep it and pick a backend for the whole process."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RacError("plots need matplotlib; pip install 'rac-modifier[eval]'") from error
    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def _panel(axes: Axes, points: list[tuple[SeedSummary, Spread]], names: list[str], dense: float | None) -> None:
    """One panel: lines over shares, lone markers over patterns, dashed line for dense."""
    positions = _positions([s.sparsity for s, _ in points])
    step = _smallest_gap(list(positions.values()))
    for index, name in enumerate(names):
        own = [(s.sparsity, spread) for s, spread in points if s.calibration == name]
        # Side by side, so that the bars of calibration sets that perform alike do not hide each other.
        shift = (index - (len(names) - 1) / 2) * 0.1 * step
        label: str | None = name
        for is_pattern in (False, True):
            part = [(positions[x] + shift, y) for x, y in own if isinstance(x, str) == is_pattern]
            if part:
                axes.errorbar(
                    [x for x, _ in part],
                    [100 * y.mean for _, y in part],
                    yerr=[[100 * (y.mean - y.low) for _, y in part], [100 * (y.high - y.mean) for _, y in part]],
                    color=_COLOURS[index],
                    marker=_MARKERS[index],
                    linestyle="none" if is_pattern else "-",
                    linewidth=1.8,
                    markersize=6,
                    elinewidth=1.2,
                    capsize=2.5,
                    label=label,
                )
                label = None
    if dense is not None:
        axes.axhline(100 * dense, color=_MUTED, linestyle=(0, (5, 3)), linewidth=1.2, label="dense", zorder=0)
    axes.set_xticks(list(positions.values()), [x if isinstance(x, str) else f"{100 * x:.3g}%" for x in positions])
    axes.set_xlabel("weights pruned in each layer", fontsize=9, color=_INK)
    axes.set_ylim(-3, 103)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
    _plain(axes)
    shares = [x for key, x in positions.items() if not isinstance(key, str)]
    patterns = [x for key, x in positions.items() if isinstance(key, str)]
    axes.set_xlim(min(positions.values()) - 0.5 * step, max(positions.values()) + 0.5 * step)
    if shares and patterns:
        axes.axvline((max(shares) + min(patterns)) / 2, color="#BBBBBB", linewidth=0.8)


def _positions(sparsities: list[float | str]) -> dict[float | str, float]:
    """Where each sparsity stands: shares at their value, patterns in columns of their own to the right."""
    ordered = sorted(set(sparsities), key=sparsity_order)
    shares = [x for x in ordered if not isinstance(x, str)]
    patterns = [x for x in ordered if isinstance(x, str)]
    gap = (shares[-1] - shares[0]) / (len(shares) - 1) if len(shares) > 1 else 0.1
    start = shares[-1] if shares else 0.0
    return {x: x for x in shares} | {x: start + (i + 1) * gap for i, x in enumerate(patterns)}


def _smallest_gap(positions: list[float]) -> float:
    return min((b - a for a, b in itertools.pairwise(positions)), default=0.1)
