"""The learning rate of a run by model size, its schedule, and the sequences per step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rac_modifier.evaluation.teacher_forcing import TokenSequence
from rac_modifier.settings.recovery import RecoverySettings

# The best of three rates at two sizes, 1e-3 at 3.4 M parameters and 2e-4 at 135 M; a power law.
_RATE, _PARAMETERS, _EXPONENT = 2e-4, 135e6, -0.437
_WARM_UP = 0.1  # share of the steps
_LAST = 0.1  # of the highest learning rate, at the last step
# Tokens whose cost equals the fixed cost of a batch on a CPU: passes over weights and gradients.
_BATCH_COST = 64


def default_learning_rate(parameters: int) -> float:
    """Return the highest learning rate by the power law; 3.6e-5 at 7 B, which was not tried."""
    return _RATE * (parameters / _PARAMETERS) ** _EXPONENT


def rate_at(step: int, steps: int) -> float:
    """Return the share of the highest rate at `step` of `steps`: linear up, then down."""
    rising = max(1, round(_WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 1.0 - (1.0 - _LAST) * (step - rising + 1) / max(1, steps - rising)


@dataclass(frozen=True)
class Step:
    """The sequences of an optimizer step, in micro-batches of like length."""

    batches: tuple[tuple[TokenSequence, ...], ...]

    @property
    def completion_tokens(self) -> int:
        """Return the tokens in the loss."""
        return sum(len(ids) - prompt for batch in self.batches for ids, prompt in batch)

    @property
    def tokens(self) -> int:
        """Return prompt and completion tokens."""
        return sum(len(ids) for batch in self.batches for ids, _ in batch)


def plan_steps(
    sequences: Sequence[TokenSequence],
    settings: RecoverySettings,
    device: torch.device,
    processes: int,
) -> list[Step]:
    """Plan passes over `sequences`, each in a new random order, of about `step_tokens` per step.

    A micro-batch has at most `batch_tokens` padded tokens. A process that is alone on a CPU also
    limits its padding: a batch on a GPU costs the time of a thousand tokens, and several processes
    share each batch. Steps are not sorted by length: that would separate the kinds of problems.
    """
    most_padding = _BATCH_COST if device.type == "cpu" and processes == 1 else None
    steps: list[Step] = []
    for number in range(settings.passes):
        order = list(sequences)
        random.Random(f"0/{number}").shuffle(order)
        chosen: list[TokenSequence] = []
        tokens = 0
        for sequence in order:
            chosen.append(sequence)
            tokens += len(sequence[0])
            if tokens >= settings.step_tokens:
                steps.append(_step(chosen, settings.batch_tokens, most_padding))
                chosen, tokens = [], 0
        if chosen and (not steps or 2 * tokens >= settings.step_tokens):
            steps.append(_step(chosen, settings.batch_tokens, most_padding))
    return steps


def _step(chosen: Sequence[TokenSequence], batch_tokens: int, most_padding: int | None) -> Step:
    batches: list[list[TokenSequence]] = [[]]
    for sequence in sorted(chosen, key=lambda s: len(s[0])):
        if last := batches[-1]:
            length = len(sequence[0])
            padding = len(last) * (length - len(last[-1][0]))
            too_padded = most_padding is not None and padding > most_padding
            if too_padded or (len(last) + 1) * length > batch_tokens:
                batches.append([])
        batches[-1].append(sequence)
    return Step(tuple(map(tuple, batches)))
