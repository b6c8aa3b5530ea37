"""Results of several models as the text of a table's cells, after a check that they may stand side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rac_modifier.errors import RacError

if TYPE_CHECKING:  # a table of results needs no torch
    from rac_modifier.evaluation.divergence import DivergenceResult
    from rac_modifier.evaluation.results import EvalResult


@dataclass(frozen=True)
class ResultTable:
    """A head, one row per model, and a line that states what all rows share."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def accuracy_table(results: Sequence[EvalResult], *, allow_mixed_caps: bool = False) -> ResultTable:
    """Results in the order given; the note states the cap and the sampling.

    `thinking` and `tokens` are means per answer; `unfinished` is the share of answers cut off at the cap. Where some of them
    repeated themselves at their end, `repeating` is the share of these among all answers. With several answers per problem,
    accuracy is pass@1, and pass@k for the largest k stands beside it.

    Raises:
        RacError: no results, or results of different caps (a longer cap finishes more answers, so accuracy and length
            cannot be compared) without `allow_mixed_caps`, which shows the cap as a column.
    """
    if not results:
        raise RacError("no results to put in a table; give at least one")
    caps = sorted({r.cap for r in results})
    mixed = len(caps) > 1
    if mixed and not allow_mixed_caps:
        raise RacError(
            f"results at different caps ({', '.join(map(str, caps))} new tokens) cannot be compared; evaluate all at "
            "one cap, or pass allow_mixed_caps=True to see them side by side"
        )
    samples = sorted({r.samples for r in results})
    if len(samples) > 1:
        raise RacError(
            f"results of {' and '.join(map(str, samples))} answers per problem cannot be compared; evaluate alike"
        )
    (several,) = samples
    head = [
        "model",
        "accuracy",
        "95 % CI",
        "thinking",
        "tokens",
        "unfinished",
        "tokens/s",
        "minutes",
        "problems",
    ]
    if several > 1:
        head.append(f"pass@{several}")
    loops = any(r.repeating_share for r in results)
    if loops:
        head.append("repeating")
    temperatures = sorted({r.temperature for r in results})
    sampling = ", ".join("greedy" if t == 0 else f"temperature {t:g}" for t in temperatures)
    answers = f"; {several} answers per problem" if several > 1 else ""
    answers += (
        "; repeating: answers that were cut off while their end repeated itself" if loops else ""
    )
    return ResultTable(
        head=(*head, "cap") if mixed else tuple(head),
        rows=tuple((*_cells(r, loops), str(r.cap)) if mixed else _cells(r, loops) for r in results),
        note=f"{sampling}{answers}"
        if mixed
        else f"At most {caps[0]} new tokens per answer; {sampling}{answers}.",
    )


def _cells(result: EvalResult, loops: bool) -> tuple[str, ...]:
    return (
        result.label,
        f"{result.accuracy:.1%}",
        f"{100 * result.ci_low:.1f}-{100 * result.ci_high:.1f}",
        f"{result.mean_thinking_tokens:.0f}",
        f"{result.mean_completion_tokens:.0f}",
        f"{result.unfinished_share:.1%}",
        f"{result.tokens_per_second:.0f}" if result.tokens_per_second else "-",
        f"{result.seconds / 60:.1f}",
        str(result.problems),
        *((f"{result.pass_at[str(result.samples)]:.1%}",) if result.samples > 1 else ()),
        *(
            ("-" if result.repeating_share is None else f"{result.repeating_share:.1%}",)
            if loops
            else ()
        ),
    )


def divergence_table(results: Sequence[DivergenceResult]) -> ResultTable:
    """Divergence from the dense model in the order given, each mean with its standard error.

    Raises:
        RacError: no results, or results on different sequences.
    """
    check_same_sequences(results)
    first = results[0]
    return ResultTable(
        head=("model", "KL, nats per token", "top-1 agreement"),
        rows=tuple(
            (
                r.label,
                _with_error(r.kl, r.kl_stderr, ".3f"),
                _with_error(r.agreement, r.agreement_stderr, ".1%"),
            )
            for r in results
        ),
        note=f"KL(dense || model) on {first.tokens:,} completion tokens of {first.sequences:,} sequences; ± one standard "
        "error over sequences.",
    )


def check_same_sequences(results: Sequence[DivergenceResult]) -> None:
    """Raise a RacError unless there are results that can stand side by side."""
    if not results:
        raise RacError("no divergence results to show; give at least one")
    shapes = {(r.tokens, r.sequences, tuple(b.start for b in r.bins)) for r in results}
    if len(shapes) > 1:
        counts = ", ".join(
            f"{r.label}: {r.tokens:,} tokens of {r.sequences:,} sequences" for r in results
        )
        raise RacError(
            f"results on different sequences or bins cannot be compared ({counts}); measure all on one set"
        )


def _with_error(mean: float, error: float | None, form: str) -> str:
    return f"{mean:{form}}" if error is None else f"{mean:{form}} ± {error:{form}}"
