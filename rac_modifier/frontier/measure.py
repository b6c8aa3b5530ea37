"""One model of a frontier measured: its answers to the held-out problems, and its divergence along the dense model's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from rac_modifier.evaluation.accuracy import row_of
from rac_modifier.evaluation.divergence import (
    TokenDivergence,
    divergence_per_token,
    mean_over_tokens,
    summarise_divergence,
)
from rac_modifier.evaluation.results import EvalResult, paired_difference, summarise
from rac_modifier.frontier.traces import ask, trace_of
from rac_modifier.problems.answers import thinking_length
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import Generation
from rac_modifier.sampling.prompts import render_question
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces.selection import repeated_tail

MOST_TRACES = 300
"""Problems whose traces are kept; accuracy and divergence are measured on all."""


@dataclass(frozen=True)
class HeldOut:
    """What every model is asked, and how."""

    problems: Sequence[Problem]
    sampling: SamplingSettings

    @property
    def graded(self) -> bool:
        """Whether every problem has an answer to check against."""
        return all(problem.answer and problem.answer.strip() for problem in self.problems)


@dataclass(frozen=True)
class Measured:
    """Figures for a row, and its traces."""

    figures: dict[str, Any]
    traces: list[dict[str, Any]]


def measure_dense(model: Any, tokenizer: Any, held_out: HeldOut) -> Measured:
    """The dense model's answers: what all other models are compared with."""
    answers, figures, correct = _answer(model, tokenizer, held_out, "dense")
    traces = [
        trace_of(tokenizer, problem, answer, right)
        for problem, answer, right in zip(held_out.problems, answers, correct, strict=True)
    ]
    return Measured(figures, traces)


def measure(
    label: str, model: Any, dense: Any, tokenizer: Any, held_out: HeldOut, reference: Measured
) -> Measured:
    """Answers of a compressed model, and its divergence from the dense model on the dense model's answers.

    Args:
        label: of the row.
        model: the compressed one.
        dense: the model that it was made from.
        tokenizer: of both.
        held_out: problems and sampling, those that `reference` was measured with.
        reference: the dense model's, with the traces of all problems.

    Raises:
        RacError: what sampling and `divergence` raise.
    """
    answers, figures, correct = _answer(model, tokenizer, held_out, label)
    of_dense = [Generation(tuple(trace["ids"]), trace["finish"]) for trace in reference.traces]
    prompts = [
        render_question(tokenizer, problem.question, held_out.sampling)
        for problem in held_out.problems
    ]
    started = time.monotonic()
    sequences = [
        ((*prompt, *answer.ids), len(prompt))
        for prompt, answer in zip(prompts, of_dense, strict=True)
    ]
    tokens = divergence_per_token(dense, model, sequences, label=label)
    found = summarise_divergence(tokens, label=label, seconds=time.monotonic() - started)
    figures["divergence"] = found.as_dict()
    figures["outside_repetitions"] = _outside_repetitions(of_dense, tokens)
    if figures["accuracy"] and reference.figures["accuracy"]:
        first, second = (
            EvalResult.from_dict(each["accuracy"]) for each in (reference.figures, figures)
        )
        figures["paired"] = paired_difference(first, second).as_dict()
    traces = [
        trace_of(tokenizer, *each)
        for each in list(zip(held_out.problems, answers, correct, of_dense, tokens, strict=True))[
            :MOST_TRACES
        ]
    ]
    return Measured(figures, traces)


def _answer(
    model: Any, tokenizer: Any, held_out: HeldOut, label: str
) -> tuple[list[Generation], dict[str, Any], list[bool | None]]:
    """Answers to all problems, figures about them, and whether each is right."""
    started = time.monotonic()
    answers = ask(model, tokenizer, held_out.problems, held_out.sampling)
    seconds = time.monotonic() - started
    lengths = [thinking_length(tokenizer, answer.ids) for answer in answers]
    figures: dict[str, Any] = {
        "length": {
            "mean": fmean(lengths),
            "percentiles": {
                str(share): float(np.percentile(lengths, share)) for share in (50, 90, 99)
            },
            "cut_share": fmean(answer.finish_reason != "stop" for answer in answers),
            "repeating_share": fmean(
                repeated_tail(answer.ids, answer.finish_reason) > 0 for answer in answers
            ),
            "thinking": lengths,
        },
        "accuracy": None,
        "divergence": None,
        "outside_repetitions": None,
        "paired": None,
    }
    if not held_out.graded:
        return answers, figures, [None] * len(answers)
    sampling = held_out.sampling
    rows = [
        row_of(tokenizer, problem, answer, None)
        for problem, answer in zip(held_out.problems, answers, strict=True)
    ]
    result = summarise(
        rows,
        label=label,
        seconds=seconds,
        cap=sampling.max_new_tokens,
        temperature=sampling.temperature or 0.0,
        seed=sampling.seed,
    )
    figures["accuracy"] = result.as_dict()
    return answers, figures, [row.correct for row in rows]


def _outside_repetitions(
    answers: Sequence[Generation], tokens: Sequence[TokenDivergence]
) -> dict[str, float | None] | None:
    """KL on the dense model's answers without tails that repeat, which are easy to predict; None where no answer has one."""
    tails = [repeated_tail(answer.ids, answer.finish_reason) for answer in answers]
    if not any(tails):
        return None
    kl = [row.kl[: len(row.kl) - tail] for row, tail in zip(tokens, tails, strict=True)]
    mean, error = mean_over_tokens(kl)
    return {"tokens": sum(map(len, kl)), "kl": mean, "kl_stderr": error}


def layers_of(record: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Relative error and sparsity of each pruned module, from a run record; empty where nothing was pruned."""
    modules = record.get("modules")
    return {
        str(values["name"]): {
            "error": _number(values, "relative_error"),
            "sparsity": _number(values, "sparsity"),
        }
        for values in (modules if isinstance(modules, list) else ())
        if isinstance(values, Mapping) and "name" in values
    }


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None
