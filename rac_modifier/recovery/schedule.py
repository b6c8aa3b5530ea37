"""How a recovery run is laid out: the learning rate by model size, its schedule, and the sequences of each step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rac_modifier.evaluation.teacher_forcing import TokenSequence

# The best of three rates in trials at two sizes: 1e-3 at 3.4 M parameters, 2e-4 at 135 M; a power law through both.
_RATE, _PARAMETERS, _EXPONENT = 2e-4, 135e6, -0.437
WARM_UP = 0.1  # share of the steps
LAST = 0.1  # of the highest learning rate, at the last step


def default_learning_rate(parameters: int) -> float:
    """The highest learning rate for a model of so many parameters: 1e-3 at 3.4 M, 2e-4 at 135 M, 7e-5 at 1.5 B, 3.6e-5 at 7 B.

    Only the first two were tried; the others lie on the power law through them.
    """
    return _RATE * (max(parameters, 1) / _PARAMETERS) ** _EXPONENT


def rate_at(step: int, steps: int) -> float:
    """The share of the highest learning rate at `step` of `steps`, counted from 0: linear up, then linear down to `LAST`."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 1.0 - (1.0 - LAST) * (step - rising + 1) / max(1, steps - rising)


@dataclass(frozen=True)
class Step:
    """One optimizer step: its sequences in micro-batches of like length, and the completion tokens of all of them."""

    batches: tuple[tuple[TokenSequence, ...], ...]

    @property
    def completion_tokens(self) -> int:
        """Tokens that the loss is taken on."""
        return sum(len(ids) - prompt for batch in self.batches for ids, prompt in batch)

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens."""
        return sum(len(ids) for batch in self.batches for ids, _ in batch)


def plan_steps(
    sequences: Sequence[TokenSequence], *, step_tokens: int, batch_tokens: int, passes: int, seed: int
) -> list[Step]:
    """Each pass over `sequences` in a new random order, about `step_tokens` tokens per step.

    Within a step sequences of like length share a micro-batch of at most `batch_tokens` padded tokens. Steps are not sorted by
    length: that would separate the kinds of problems.
    """
    steps: list[Step] = []
    for number in range(passes):
        order = list(sequences)
        random.Random(f"{seed}/{number}").shuffle(order)
        chosen: list[TokenSequence] = []
        for sequence in order:
            chosen.append(sequence)
            if sum(len(ids) for ids, _ in chosen) >= step_tokens:
                steps.append(_step(chosen, batch_tokens))
                chosen = []
        if chosen and (not steps or 2 * sum(len(ids) for ids, _ in chosen) >= step_tokens):
            steps.append(_step(chosen, batch_tokens))
    return steps


def _step(chosen: Sequence[TokenSequence], batch_tokens: int) -> Step:
    batches: list[list[TokenSequence]] = [[]]
    for sequence in sorted(chosen, key=lambda s: len(s[0])):
        if batches[-1] and (len(batches[-1]) + 1) * len(sequence[0]) > batch_tokens:
            batches.append([])
        batches[-1].append(sequence)
    return Step(tuple(map(tuple, batches)))
