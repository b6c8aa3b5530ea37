"""Answers of a model as traces that can be laid beside those of the dense one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from rac_modifier.evaluation.divergence import TokenDivergence
from rac_modifier.evaluation.teacher_forcing import sample_sequences
from rac_modifier.problems.answers import thinking_length
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import Generation, eos_token_ids
from rac_modifier.settings.sampling import SamplingSettings

_BROKEN = "\ufffd"  # what a decoder writes for a part of a character


def ask(
    model: Any, tokenizer: Any, problems: Sequence[Problem], sampling: SamplingSettings
) -> list[Generation]:
    """One answer per problem, in their order.

    Raises:
        RacError: what `sample_sequences` raises.
    """
    ends = set(eos_token_ids(model, tokenizer))
    found = sample_sequences(model, tokenizer, problems, sampling)
    answers = [tuple(ids[start:]) for ids, start in found]
    return [Generation(ids, "stop" if ids and ids[-1] in ends else "length") for ids in answers]


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; a character that several tokens share belongs to the last of them, special tokens are shown."""
    pieces, before, read = [], 0, 0
    for i in range(len(ids)):
        # from the token before, since some tokenizers drop the space of a first token
        old, new = (
            tokenizer.decode(list(ids[before:read])),
            tokenizer.decode(list(ids[before : i + 1])),
        )
        if i + 1 < len(ids) and new.endswith(_BROKEN):
            pieces.append("")
            continue
        pieces.append(new[len(old) :])
        before, read = read, i + 1
    return pieces


def trace_of(
    tokenizer: Any,
    problem: Problem,
    answer: Generation,
    correct: bool | None,
    dense: Generation | None = None,
    divergence: TokenDivergence | None = None,
) -> dict[str, Any]:
    """A trace in plain values.

    Args:
        tokenizer: of the model.
        problem: that was asked.
        answer: of the model.
        correct: whether the answer is right; None without a reference answer.
        dense: the dense model's answer, for a compressed model.
        divergence: of the compressed model on the dense model's answer, a value per token.
    """
    pieces = pieces_of(tokenizer, answer.ids)
    trace: dict[str, Any] = {
        "id": problem.id,
        "ids": list(answer.ids),
        "text": "".join(pieces),
        "correct": correct,
        "finish": answer.finish_reason,
        "thinking": thinking_length(tokenizer, answer.ids),
    }
    if dense is None:
        return trace | {
            "question": problem.question,
            "answer": problem.answer,
            "pieces": [len(piece) for piece in pieces],
        }
    same = sum(
        1
        for _ in takewhile(
            lambda pair: pair[0] == pair[1], zip(answer.ids, dense.ids, strict=False)
        )
    )
    trace["same_tokens"] = same
    trace["same_characters"] = sum(len(piece) for piece in pieces[:same])
    if divergence is not None:
        trace["kl"] = [round(value, 4) for value in divergence.kl]
    return trace
