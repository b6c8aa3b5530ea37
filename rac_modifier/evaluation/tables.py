"""Tables of results, a row per model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rac_modifier.evaluation.results import EvalResult

if TYPE_CHECKING:  # a table of results needs no torch
    from rac_modifier.measure.divergence import DivergenceResult


@dataclass(frozen=True)
class ResultTable:
    """A head, a row per model, and a line on what all rows share."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def accuracy_table(results: Sequence[EvalResult]) -> ResultTable:
    """Return a row per result of one cap, temperature and number of answers per problem."""
    first = results[0]
    columns = {"model": [r.label for r in results]}
    if first.accuracy is not None:
        bounds = [(100 * (r.ci_low or 0), 100 * (r.ci_high or 0)) for r in results]
        columns["accuracy"] = [f"{r.accuracy:.1%}" for r in results]
        columns["95 % CI"] = [f"{low:.1f}-{high:.1f}" for low, high in bounds]
    columns |= {
        "thinking": [f"{r.mean_thinking_tokens:.0f}" for r in results],
        "tokens": [f"{r.mean_completion_tokens:.0f}" for r in results],
        "unfinished": [f"{r.unfinished_share:.1%}" for r in results],
        "tokens/s": [f"{r.tokens_per_second:.0f}" if r.tokens_per_second else "-" for r in results],
        "minutes": [f"{r.seconds / 60:.1f}" for r in results],
        "problems": [str(r.problems) for r in results],
    }
    sampled = f"temperature {first.temperature:g}" if first.temperature else "greedy"
    note = f"At most {first.cap} new tokens per answer; {sampled}"
    if first.samples > 1:
        if first.accuracy is not None:
            columns[f"pass@{first.samples}"] = [f"{r.pass_at[str(r.samples)]:.1%}" for r in results]
        note += f"; {first.samples} answers per problem"
    return ResultTable(tuple(columns), tuple(zip(*columns.values(), strict=True)), f"{note}.")


def stopping_table(results: Sequence[EvalResult]) -> ResultTable:
    """Return the share of each kind of ending and the mean lengths, a row per result."""
    rows = []
    for result in results:
        *shares, thinking, answer = result.stopping().values()
        percentages = (f"{share:.1%}" for share in shares)
        rows.append((result.label, *percentages, f"{thinking:.0f}", f"{answer:.0f}"))
    looping, going = "truncated: looping", "truncated: going"
    kinds: tuple[str, ...] = ("finished", looping, going)
    note = "No answer was compared with a reference."
    if results[0].accuracy is not None:
        kinds = ("right", "wrong", "truncated: reached", looping, going)
        note = (
            "Reached: the last answer stated before the cap is right. Accuracy counts it if boxed."
        )
    head = ("model", *kinds, "closes thinking", "thinking", "answer")
    return ResultTable(head, tuple(rows), note)


def divergence_table(results: "Sequence[DivergenceResult]") -> ResultTable:
    """Return divergences with standard errors, on the same sequences, a row per result."""

    def with_error(mean: float, error: float | None, form: str) -> str:
        return f"{mean:{form}}" if error is None else f"{mean:{form}} ± {error:{form}}"

    rows = tuple(
        (
            r.label,
            with_error(r.kl, r.kl_stderr, ".3f"),
            with_error(r.agreement, r.agreement_stderr, ".1%"),
        )
        for r in results
    )
    return ResultTable(
        ("model", "KL, nats per token", "top-1 agreement"),
        rows,
        f"KL(dense || model) on {results[0].tokens:,} completion tokens of "
        f"{results[0].sequences:,} sequences; ± one standard error over sequences, from 16 on.",
    )
