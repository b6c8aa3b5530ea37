"""The learning rate of a recovery run by model size, its schedule, and the sequences of each step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rac_modifier.evaluation.teacher_forcing import TokenSequence
from rac_modifier.settings.recovery import RecoverySettings

# The best of three rates at two sizes, 1e-3 at 3.4 M parameters and 2e-4 at 135 M; a power law.
_RATE, _PARAMETERS, _EXPONENT = 2e-4, 135e6, -0.437
WARM_UP = 0.1  # share of the steps
LAST = 0.1  # of the highest learning rate, at the last step
# Tokens whose cost equals the fixed cost of a batch on a CPU: passes over weights and gradients.
_BATCH_COST = 64


def default_learning_rate(parameters: int) -> float:
    """Return the highest learning rate: 1e-3 at 3.4 M parameters, 2e-4 at 135 M, 3.6e-5 at 7 B.

    Only the first two were tried; the others lie on the power law through them.
    """
    return _RATE * (max(parameters, 1) / _PARAMETERS) ** _EXPONENT


def rate_at(step: int, steps: int) -> float:
    """Return the share of the highest rate at `step` of `steps`: linear up, then down to `LAST`."""
    rising = max(1, round(WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 1.0 - (1.0 - LAST) * (step - rising + 1) / max(1, steps - rising)


@dataclass(frozen=True)
class Step:
    """The sequences of an optimizer step, in micro-batches of like length."""

    batches: tuple[tuple[TokenSequence, ...], ...]

    @property
    def completion_tokens(self) -> int:
        """Count the tokens in the loss."""
        return sum(len(ids) - prompt for batch in self.batches for ids, prompt in batch)

    @property
    def tokens(self) -> int:
        """Count prompt and completion tokens."""
        return sum(len(ids) for batch in self.batches for ids, _ in batch)


def most_padding(device: torch.device, processes: int) -> int | None:
    """Return the tokens of padding above which a batch is split; None: it is never split.

    A batch on a GPU costs as much as a thousand tokens, and several processes share every batch.
    """
    return _BATCH_COST if device.type == "cpu" and processes == 1 else None


def steps_of_run(
    training: Sequence[TokenSequence],
    settings: RecoverySettings,
    device: torch.device,
    processes: int,
) -> list[Step]:
    """Plan the steps of a run on this device."""
    return plan_steps(
        training,
        step_tokens=settings.step_tokens,
        batch_tokens=settings.batch_tokens,
        passes=settings.passes,
        most_padding=most_padding(device, processes),
    )


def plan_steps(
    sequences: Sequence[TokenSequence],
    *,
    step_tokens: int,
    batch_tokens: int,
    passes: int,
    most_padding: int | None = None,
) -> list[Step]:
    """Plan passes over `sequences`, each in a new random order, of about `step_tokens` per step.

    A micro-batch has at most `batch_tokens` padded tokens and `most_padding` tokens of padding. Steps are
    not sorted by length: that would separate the kinds of problems.
    """
    steps: list[Step] = []
    for number in range(passes):
        order = list(sequences)
        random.Random(f"0/{number}").shuffle(order)
        chosen: list[TokenSequence] = []
        for sequence in order:
            chosen.append(sequence)
            if sum(len(ids) for ids, _ in chosen) >= step_tokens:
                steps.append(_step(chosen, batch_tokens, most_padding))
                chosen = []
        if chosen and (not steps or 2 * sum(len(ids) for ids, _ in chosen) >= step_tokens):
            steps.append(_step(chosen, batch_tokens, most_padding))
    return steps


def _step(chosen: Sequence[TokenSequence], batch_tokens: int, most_padding: int | None) -> Step:
    batches: list[list[TokenSequence]] = [[]]
    for sequence in sorted(chosen, key=lambda s: len(s[0])):
        if last := batches[-1]:
            length = len(sequence[0])
            padding = len(last) * (length - len(last[-1][0]))
            if (len(last) + 1) * length > batch_tokens or (
                most_padding is not None and padding > most_padding
            ):
                batches.append([])
        batches[-1].append(sequence)
    return Step(tuple(map(tuple, batches)))
