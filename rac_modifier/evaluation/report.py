"""Tables of results of several models, after a check that they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rac_modifier.errors import RacError
from rac_modifier.evaluation.stopping import summary

if TYPE_CHECKING:  # a table of results needs no torch
    from rac_modifier.evaluation.divergence import DivergenceResult
    from rac_modifier.evaluation.results import EvalResult


@dataclass(frozen=True)
class ResultTable:
    """A head, a row per model, and a line on what all rows share."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def accuracy_table(results: Sequence[EvalResult]) -> ResultTable:
    """Return the results in the order given; the note states the cap and the sampling.

    `thinking` and `tokens` are means per answer; `unfinished` is the share of truncated answers. With
    several answers per problem, accuracy is pass@1, and a column has pass@k for the largest k.

    Raises:
        RacError: no results, or results of different caps or numbers of answers: a longer cap finishes
            more answers, so accuracy and length cannot be compared.
    """
    if not results:
        raise RacError("no results to put in a table; give at least one")
    caps, samples = sorted({r.cap for r in results}), sorted({r.samples for r in results})
    if len(caps) > 1:
        raise RacError(
            f"results at different caps ({', '.join(map(str, caps))} new tokens) cannot be compared; "
            "evaluate all at one cap"
        )
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
    note = f"At most {caps[0]} new tokens per answer; "
    note += ", ".join("greedy" if t == 0 else f"temperature {t:g}" for t in temperatures)
    if samples[0] > 1:
        columns[f"pass@{samples[0]}"] = [f"{r.pass_at[str(r.samples)]:.1%}" for r in results]
        note += f"; {samples[0]} answers per problem"
    return ResultTable(tuple(columns), tuple(zip(*columns.values(), strict=True)), f"{note}.")


def stopping_table(results: Sequence[EvalResult]) -> ResultTable:
    """Return the share of each kind of ending and the mean lengths, a row per result."""
    return ResultTable(
        head=(
            "model",
            "right",
            "wrong",
            *("truncated: reached", "truncated: looping", "truncated: going"),
            *("closes thinking", "thinking", "answer"),
        ),
        rows=tuple(_stopping_row(result) for result in results),
        note="Reached: the last answer stated before the cap is right. Accuracy counts it if boxed.",
    )


def _stopping_row(result: EvalResult) -> tuple[str, ...]:
    *shares, thinking, answer = summary(result.endings).values()
    percentages = (f"{share:.1%}" for share in shares)
    return (result.label, *percentages, f"{thinking:.0f}", f"{answer:.0f}")


def divergence_table(results: Sequence[DivergenceResult]) -> ResultTable:
    """Return divergences from the dense model in the order given, with standard errors.

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
        note=f"KL(dense || model) on {first.tokens:,} completion tokens of {first.sequences:,} "
        "sequences; ± one standard error over sequences, from 16 sequences on.",
    )


def check_same_sequences(results: Sequence[DivergenceResult]) -> None:
    """Check that results can be compared.

    Raises:
        RacError: no results, or results on different sequences.
    """
    if not results:
        raise RacError("no divergence results to show; give at least one")
    shapes = {(r.tokens, r.sequences, tuple(b.start for b in r.bins)) for r in results}
    if len(shapes) > 1:
        counts = ", ".join(
            f"{r.label}: {r.tokens:,} tokens of {r.sequences:,} sequences" for r in results
        )
        raise RacError(
            f"results on different sequences or bins cannot be compared ({counts}); measure all on "
            "one set"
        )


def _with_error(mean: float, error: float | None, form: str) -> str:
    return f"{mean:{form}}" if error is None else f"{mean:{form}} ± {error:{form}}"
