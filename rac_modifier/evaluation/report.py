"""Results as a table, and repeated runs as mean and spread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.evaluation.divergence_result import DivergenceResult
from rac_modifier.evaluation.results import EvalResult

_COLUMNS = ("model", "accuracy", "95 % CI", "thinking", "tokens", "unfinished", "tokens/s", "minutes", "problems")


def render_table(results: Sequence[EvalResult], *, markdown: bool = False, allow_mixed_caps: bool = False) -> str:
    """Results as an aligned table, in the order given, with the cap and the sampling stated below it.

    `thinking` and `tokens` are means a problem; `unfinished` is the share of answers cut off at the cap.

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
    rows = [[*_COLUMNS, *(["cap"] if mixed else [])]]
    rows += [[*_cells(r), *([str(r.cap)] if mixed else [])] for r in results]
    temperatures = sorted({r.temperature for r in results})
    sampling = ", ".join("greedy" if t == 0 else f"temperature {t:g}" for t in temperatures)
    note = sampling if mixed else f"At most {caps[0]} new tokens a problem; {sampling}."
    return "\n".join([*_aligned(rows, markdown), "", note])


def _cells(result: EvalResult) -> list[str]:
    return [
        result.label,
        f"{result.accuracy:.1%}",
        f"{100 * result.ci_low:.1f}-{100 * result.ci_high:.1f}",
        f"{result.mean_thinking_tokens:.0f}",
        f"{result.mean_completion_tokens:.0f}",
        f"{result.unfinished_share:.1%}",
        f"{result.tokens_per_second:.0f}",
        f"{result.seconds / 60:.1f}",
        str(result.problems),
    ]


def render_divergence_table(results: Sequence[DivergenceResult], *, markdown: bool = False) -> str:
    """Divergence from the dense model as an aligned table, in the order given; a standard error stands behind each mean.

    Raises:
        RacError: no results, or results on different sequences.
    """
    check_same_sequences(results)
    rows = [["model", "KL, nats a token", "top-1 agreement"]]
    for r in results:
        rows.append(
            [r.label, _with_error(r.kl, r.kl_stderr, ".3f"), _with_error(r.agreement, r.agreement_stderr, ".1%")]
        )
    first = results[0]
    note = (
        f"KL(dense || model) on {first.tokens:,} completion tokens of {first.sequences:,} sequences; ± one standard error "
        "over sequences."
    )
    return "\n".join([*_aligned(rows, markdown), "", note])


def check_same_sequences(results: Sequence[DivergenceResult]) -> None:
    """Raise a RacError unless there are results that can stand side by side."""
    if not results:
        raise RacError("no divergence results to show; give at least one")
    shapes = {(r.tokens, r.sequences, tuple(b.start for b in r.bins)) for r in results}
    if len(shapes) > 1:
        counts = ", ".join(f"{r.label}: {r.tokens:,} tokens of {r.sequences:,} sequences" for r in results)
        raise RacError(f"results on different sequences or bins cannot be compared ({counts}); measure all on one set")


def _with_error(mean: float, error: float | None, form: str) -> str:
    return f"{mean:{form}}" if error is None else f"{mean:{form}} ± {error:{form}}"


def _aligned(rows: list[list[str]], markdown: bool, text_columns: int = 1) -> list[str]:
    """The first columns are text and stand to the left, the others to the right."""
    if markdown:
        rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        [
            cell.ljust(w) if i < text_columns else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(r, widths, strict=True))
        ]
        for r in rows
    ]
    if not markdown:
        return ["  ".join(line).rstrip() for line in lines]
    rule = ["-" * w if i < text_columns else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return ["| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]]]


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

    Rows have `sparsity` (a share, or a pattern such as "2:4"), `calibration` and `accuracy`, one row a seed, and
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
            raise RacError(f"a row has no {' and no '.join(missing)}: {dict(row)}; each row needs them")
        groups.setdefault((parse_sparsity(row["sparsity"]), str(row["calibration"])), []).append(row)
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


def render_seed_table(rows: Iterable[Mapping[str, Any]], dense: Mapping[str, Any]) -> str:
    """Mean and (lowest-highest) over seeds of each sparsity and calibration set, as Markdown, dense first.

    Args:
        rows: as `summarise_seeds` takes them; `cap` is compared where they have it.
        dense: the unpruned model's row: `accuracy`, `unfinished_share`, `mean_thinking_tokens`.

    Raises:
        RacError: see `summarise_seeds`; a row measured at another cap than dense.
    """
    rows = list(rows)
    caps = {row["cap"] for row in [dense, *rows] if "cap" in row}
    if len(caps) > 1:
        raise RacError(
            f"rows at different caps ({', '.join(map(str, sorted(caps)))} new tokens) cannot be compared; "
            "evaluate all at one cap"
        )
    reference = summarise_seeds([{**dense, "sparsity": 0.0, "calibration": "dense"}])
    table = [["sparsity", "calibration", "accuracy", "unfinished", "thinking", "seeds"]]
    for s in reference + summarise_seeds(rows):
        sparsity = s.sparsity if isinstance(s.sparsity, str) else f"{s.sparsity:.3g}"
        table.append(
            [
                "-" if s.calibration == "dense" else sparsity,
                s.calibration,
                _percent(s.accuracy),
                _percent(s.unfinished_share) if s.unfinished_share else "-",
                f"{s.mean_thinking_tokens.mean:.0f}" if s.mean_thinking_tokens else "-",
                str(s.seeds),
            ]
        )
    return "\n".join(_aligned(table, markdown=True, text_columns=2))


def _percent(spread: Spread) -> str:
    mean = f"{spread.mean:.1%}"
    return mean if spread.low == spread.high else f"{mean} ({100 * spread.low:.1f}-{100 * spread.high:.1f})"


def parse_sparsity(value: float | str) -> float | str:
    """A share from 0 to 1 as a float, or a pattern such as "2:4" as it is."""
    if isinstance(value, str) and ":" in value:
        return value
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise RacError(f'sparsity {value!r} is neither a share from 0 to 1 nor a pattern; use 0.5 or "2:4"')
    return share


def sparsity_order(sparsity: float | str) -> tuple[bool, float, str]:
    """Sort key: shares by size, then patterns by name."""
    return (True, 0.0, sparsity) if isinstance(sparsity, str) else (False, sparsity, "")


def _spread(values: list[float]) -> Spread:
    # fmean rounds: of equal values it must not leave their range.
    return Spread(min(max(fmean(values), min(values)), max(values)), min(values), max(values))


def _optional_spread(group: list[Mapping[str, Any]], name: str) -> Spread | None:
    values = [float(row[name]) for row in group if row.get(name) is not None]
    if values and len(values) < len(group):
        raise RacError(
            f"{len(group) - len(values)} of {len(group)} rows of sparsity {group[0]['sparsity']!r}, calibration "
            f"{group[0]['calibration']!r} have no {name}; give it in all of them or in none"
        )
    return _spread(values) if values else None
