"""The results of one evaluation: one row per problem, and the summary of all rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rac_modifier.errors import RacError


@dataclass(frozen=True)
class Row:
    """One problem's outcome; token counts are the completion's, EOS included."""

    id: str
    task: str | None
    correct: bool
    finish: str  # "stop": the model ended its answer; "length": it was cut off at the cap
    prompt_tokens: int
    tokens: int
    thinking_tokens: int  # up to and including </think>; all of them where that is missing
    text: str


@dataclass(frozen=True)
class EvalResult:
    """Accuracy and length of one model's answers at one cap; compare only with results at the same cap."""

    label: str
    problems: int
    correct: int
    accuracy: float
    ci_low: float  # Wilson score interval, 95 %
    ci_high: float
    mean_thinking_tokens: float
    mean_completion_tokens: float
    unfinished_share: float  # of all problems, those cut off at the cap
    tokens_per_second: float
    seconds: float  # generation only, without loading the model and checking answers
    cap: int  # most new tokens per problem
    temperature: float
    seed: int
    per_task: dict[str, float]  # accuracy of each named task

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvalResult:
        """A result from `as_dict`'s output.

        Raises:
            RacError: a field is missing or unknown.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if values.keys() != names:
            missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names)
            raise RacError(
                f"not an evaluation result: missing {missing}, unknown {unknown}; evaluate again with this version"
            )
        return cls(**values)


def wilson_interval(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval for a proportion (95 % by default), which unlike the normal one is valid near 0 and 1 too."""
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # Without this, rounding could put a perfect score outside its own interval.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def summarise(
    rows: Sequence[Row], *, label: str, seconds: float, cap: int, temperature: float, seed: int
) -> EvalResult:
    """The result of a non-empty list of rows, generated in `seconds`."""
    assert rows, "an evaluation without problems is refused earlier"
    correct = sum(row.correct for row in rows)
    low, high = wilson_interval(correct, len(rows))
    tasks = sorted({row.task for row in rows if row.task is not None})
    return EvalResult(
        label=label,
        problems=len(rows),
        correct=correct,
        accuracy=correct / len(rows),
        ci_low=low,
        ci_high=high,
        mean_thinking_tokens=fmean(row.thinking_tokens for row in rows),
        mean_completion_tokens=fmean(row.tokens for row in rows),
        unfinished_share=fmean(row.finish != "stop" for row in rows),
        tokens_per_second=sum(row.tokens for row in rows) / seconds,
        seconds=seconds,
        cap=cap,
        temperature=temperature,
        seed=seed,
        per_task={task: fmean(row.correct for row in rows if row.task == task) for task in tasks},
    )
