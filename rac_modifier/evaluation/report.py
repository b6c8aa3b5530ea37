"""Tables and plots of results of several models, after a check that they can be compared."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rac_modifier.errors import RacError
from rac_modifier.evaluation.stopping import summary

if TYPE_CHECKING:  # a table of results needs no torch
    from rac_modifier.evaluation.divergence import DivergenceResult
    from rac_modifier.evaluation.results import EvalResult

_FORMATS = (".png", ".svg", ".pdf")
# The palette of Okabe and Ito, which differs for every common colour blindness.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]


@dataclass(frozen=True)
class ResultTable:
    """A head, a row per model, and a line on what all rows share."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def accuracy_table(results: Sequence[EvalResult]) -> ResultTable:
    """Return a row per result; the note states the cap and the sampling.

    `thinking` and `tokens` are means per answer; `unfinished` is the share of truncated answers.
    With several answers per problem, accuracy is pass@1, and a column has pass@k for the largest
    k.

    Raises:
        RacError: no results, or results of different caps or numbers of answers: a longer cap
            finishes more answers, so accuracy and length cannot be compared.
    """
    cap = _shared_cap(results)
    samples = sorted({r.samples for r in results})
    if len(samples) > 1:
        raise RacError(
            f"results of {' and '.join(map(str, samples))} answers per problem cannot be compared; "
            "evaluate alike"
        )
    columns = {
        "model": [r.label for r in results],
        "accuracy": [f"{r.accuracy:.1%}" for r in results],
        "95 % CI": [f"{100 * r.ci_low:.1f}-{100 * r.ci_high:.1f}" for r in results],
        "thinking": [f"{r.mean_thinking_tokens:.0f}" for r in results],
        "tokens": [f"{r.mean_completion_tokens:.0f}" for r in results],
        "unfinished": [f"{r.unfinished_share:.1%}" for r in results],
        "tokens/s": [f"{r.tokens_per_second:.0f}" if r.tokens_per_second else "-" for r in results],
        "minutes": [f"{r.seconds / 60:.1f}" for r in results],
        "problems": [str(r.problems) for r in results],
    }
    temperatures = sorted({r.temperature for r in results})
    note = f"At most {cap} new tokens per answer; "
    note += ", ".join("greedy" if t == 0 else f"temperature {t:g}" for t in temperatures)
    if samples[0] > 1:
        columns[f"pass@{samples[0]}"] = [f"{r.pass_at[str(r.samples)]:.1%}" for r in results]
        note += f"; {samples[0]} answers per problem"
    return ResultTable(tuple(columns), tuple(zip(*columns.values(), strict=True)), f"{note}.")


def _shared_cap(results: Sequence[EvalResult]) -> int:
    caps = sorted({r.cap for r in results})
    if not caps:
        raise RacError("no results to show; give at least one")
    if len(caps) > 1:
        raise RacError(
            f"results at different caps ({', '.join(map(str, caps))} new tokens) cannot be "
            "compared; evaluate all at one cap"
        )
    return caps[0]


def stopping_table(results: Sequence[EvalResult]) -> ResultTable:
    """Return the share of each kind of ending and the mean lengths, a row per result."""
    rows = []
    for result in results:
        *shares, thinking, answer = summary(result.endings).values()
        percentages = (f"{share:.1%}" for share in shares)
        rows.append((result.label, *percentages, f"{thinking:.0f}", f"{answer:.0f}"))
    truncated = ("truncated: reached", "truncated: looping", "truncated: going")
    return ResultTable(
        ("model", "right", "wrong", *truncated, "closes thinking", "thinking", "answer"),
        tuple(rows),
        "Reached: the last answer stated before the cap is right. Accuracy counts it if boxed.",
    )


def divergence_table(results: Sequence[DivergenceResult]) -> ResultTable:
    """Return divergences from the dense model, with standard errors, a row per result.

    Raises:
        RacError: no results, or results on different sequences.
    """
    _check_same_sequences(results)
    first = results[0]
    rows = (
        (
            r.label,
            _with_error(r.kl, r.kl_stderr, ".3f"),
            _with_error(r.agreement, r.agreement_stderr, ".1%"),
        )
        for r in results
    )
    return ResultTable(
        ("model", "KL, nats per token", "top-1 agreement"),
        tuple(rows),
        f"KL(dense || model) on {first.tokens:,} completion tokens of {first.sequences:,} "
        "sequences; ± one standard error over sequences, from 16 sequences on.",
    )


def _check_same_sequences(results: Sequence[DivergenceResult]) -> None:
    if not results:
        raise RacError("no divergence results to show; give at least one")
    shapes = {(r.tokens, r.sequences, tuple(b.start for b in r.bins)) for r in results}
    if len(shapes) > 1:
        counts = ", ".join(
            f"{r.label}: {r.tokens:,} tokens of {r.sequences:,} sequences" for r in results
        )
        raise RacError(
            f"results on different sequences or bins cannot be compared ({counts}); measure all "
            "on one set"
        )


def _with_error(mean: float, error: float | None, form: str) -> str:
    return f"{mean:{form}}" if error is None else f"{mean:{form}} ± {error:{form}}"


def plot_bars(results: Sequence[EvalResult], path: str | os.PathLike[str]) -> Path:
    """Draw accuracy with its 95 % interval, and the unfinished share, of a few models.

    Raises:
        RacError: no results, results at different caps, and what `plot_file` raises.
    """
    path, cap = plot_file(path), _shared_cap(results)
    import altair as alt

    rows = [
        {
            "model": r.label,
            "share": r.accuracy,
            "low": r.ci_low,
            "high": r.ci_high,
            "unfinished": r.unfinished_share,
        }
        for r in results
    ]
    model = alt.Y("model:N", sort=None, title=None)

    def panel(column: str, end: str, title: str) -> Any:
        share = alt.X(f"{column}:Q", title=None, axis=None, scale=alt.Scale(domain=[0, 1.18]))
        base = alt.Chart(title=title).encode(y=model)
        bars = base.mark_bar(color=COLOURS[0], height={"band": 0.6}).encode(x=share)
        text = base.mark_text(align="left", dx=6).encode(
            x=f"{end}:Q", text=alt.Text(f"{column}:Q", format=".1%")
        )
        return bars + text

    interval = alt.Chart().mark_rule().encode(y=model, x=alt.X("low:Q"), x2="high:Q")
    accuracy = panel("share", "high", "Correct answers (95 % interval)") + interval
    unfinished = panel("unfinished", "unfinished", f"Not finished within {cap} tokens")
    save(alt.hconcat(accuracy, unfinished, data=alt.Data(values=rows)), path)
    return path


def plot_divergence(results: Sequence[DivergenceResult], path: str | os.PathLike[str]) -> Path:
    """Draw KL to the dense model (left) and top-1 agreement (right) by position, a line per model.

    Shaded areas are one standard error. They show errors that accumulate while a model thinks
    (arXiv 2509.12464, figure 2).

    Raises:
        RacError: no results, results on different sequences, and what `plot_file` raises.
    """
    path = plot_file(path)
    _check_same_sequences(results)
    import altair as alt

    def panel(name: str, title: str, form: str) -> Any:
        rows = [
            {
                "model": r.label,
                "position": (b.start + b.end) / 2,
                "mean": getattr(b, name),
                "low": getattr(b, name) - (getattr(b, f"{name}_stderr") or 0.0),
                "high": getattr(b, name) + (getattr(b, f"{name}_stderr") or 0.0),
            }
            for r in results
            for b in r.bins
        ]
        end = alt.Scale(domain=[0, results[0].bins[-1].end])
        base = alt.Chart(alt.Data(values=rows), title=title).encode(
            x=alt.X("position:Q", title="position in the completion, tokens", scale=end),
            color=alt.Color("model:N", sort=None, title=None, scale=alt.Scale(range=COLOURS)),
        )
        axis = alt.Axis(format=form, title=None)
        shade = base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", axis=axis), y2="high:Q")
        zero = alt.Scale(zero=name == "kl")
        return shade + base.mark_line(point=True).encode(y=alt.Y("mean:Q", axis=axis, scale=zero))

    kl = panel("kl", "KL to the dense model, nats per token", "~g")
    agreement = panel("agreement", "Same most likely token as the dense model", "~%")
    save(alt.hconcat(kl, agreement), path)
    return path


def plot_file(path: str | os.PathLike[str]) -> Path:
    """Check the path of a plot, and create its folder.

    Raises:
        RacError: another file type than .png, .svg or .pdf, or Altair is missing.
    """
    path = Path(path)
    if not all(map(importlib.util.find_spec, ("altair", "vl_convert"))):
        raise RacError("plots need altair and vl-convert; pip install 'rac-modifier[eval]'")
    if path.suffix.lower() not in _FORMATS:
        raise RacError(
            f"cannot write a plot to {str(path)!r}; use a name that ends in {', '.join(_FORMATS)}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save(chart: Any, path: Path) -> None:
    """Write an Altair chart, without the frame around its panels."""
    chart.configure_view(stroke=None).configure_legend(orient="bottom").save(path, ppi=150)
