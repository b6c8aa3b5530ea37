"""Results of an evaluation: a row per answer, and the summary of all rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from rac_modifier.errors import RacError
from rac_modifier.evaluation.intervals import mean_pass_at, share_interval
from rac_modifier.evaluation.stopping import Ending


@dataclass(frozen=True)
class Row:
    """An answer to a problem."""

    id: str  # of the problem
    task: str | None
    correct: bool
    text: str
    sample: int  # number of the answer, from 0
    ending: Ending


@dataclass(frozen=True)
class EvalResult:
    """Accuracy and length of a model's answers; compare only results at the same cap."""

    label: str
    problems: int
    samples: int  # answers per problem
    correct: int  # answers
    accuracy: float  # pass@1: the mean over problems of the share of correct answers
    ci_low: float  # 95 %, of `intervals.share_interval`
    ci_high: float
    pass_at: dict[str, float]  # pass@k for k = 1, 2, 4 ... up to `samples`
    mean_thinking_tokens: float
    thinking_percentiles: dict[str, float]  # the 50th, 90th and 99th
    mean_completion_tokens: float
    unfinished_share: float  # of all answers, those cut off at the cap
    tokens_per_second: float  # of this run; 0.0 where it generated nothing
    seconds: float  # generation only, without loading the model and checking answers
    cap: int  # most new tokens per problem
    temperature: float
    seed: int
    per_task: dict[str, float]  # accuracy of each named task
    correct_answers: dict[str, int]  # by problem; what two results are paired by
    endings: dict[str, list[Ending]]  # by problem, an ending per sample; empty: of version 0.1

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvalResult:
        """Return the result of `as_dict`'s values.

        Raises:
            RacError: a field is missing or unknown.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        # results of 0.1 have no endings
        values = {"endings": {}, **values}
        values.pop("repeating_share", None)
        if values.keys() != names:
            missing, unknown = sorted(names - values.keys()), sorted(values.keys() - names)
            raise RacError(
                f"not an evaluation result: missing {missing}, unknown {unknown}; evaluate again with "
                "this version"
            )
        endings = {
            name: [Ending.from_dict(ending) for ending in samples]
            for name, samples in values["endings"].items()
        }
        return cls(**{**values, "endings": endings})


def summarise(
    rows: Sequence[Row],
    *,
    label: str,
    seconds: float,
    cap: int,
    temperature: float,
    seed: int,
    generated: int | None = None,
) -> EvalResult:
    """Summarise a non-empty list of rows, with the same number for each problem.

    `generated` tokens took `seconds`; None: all tokens did.
    """
    assert rows, "an evaluation without problems is refused earlier"
    by_problem: dict[str, list[Row]] = {}
    for row in rows:
        by_problem.setdefault(row.id, []).append(row)
    correct = {name: sum(row.correct for row in answers) for name, answers in by_problem.items()}
    (samples,) = {len(answers) for answers in by_problem.values()}
    shares = [count / samples for count in correct.values()]
    low, high = share_interval(shares)
    thinking = [row.ending.thinking_tokens for row in rows]
    tasks = sorted({row.task for row in rows if row.task is not None})
    tokens = sum(row.ending.tokens for row in rows) if generated is None else generated
    return EvalResult(
        label=label,
        problems=len(by_problem),
        samples=samples,
        correct=sum(correct.values()),
        accuracy=fmean(shares),
        ci_low=low,
        ci_high=high,
        pass_at=mean_pass_at(list(correct.values()), samples),
        mean_thinking_tokens=fmean(thinking),
        thinking_percentiles={
            str(share): float(np.percentile(thinking, share)) for share in (50, 90, 99)
        },
        mean_completion_tokens=fmean(row.ending.tokens for row in rows),
        unfinished_share=fmean(row.ending.truncated for row in rows),
        tokens_per_second=tokens / seconds if tokens else 0.0,
        seconds=seconds,
        cap=cap,
        temperature=temperature,
        seed=seed,
        per_task={task: fmean(row.correct for row in rows if row.task == task) for task in tasks},
        correct_answers=correct,
        endings={name: [row.ending for row in answers] for name, answers in by_problem.items()},
    )
