"""How a recovery run is laid out: the learning rate by model size, its schedule, and the sequences of each step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rac_modifier.evaluation.teacher_forcing import TokenSequence
from rac_modifier.settings.recovery import RecoverySettings

# The best of three rates in trials at two sizes: 1e-3 at 3.4 M parameters, 2e-4 at 135 M; a power law through both.
_RATE, _PARAMETERS, _EXPONENT = 2e-4, 135e6, -0.437
WARM_UP = 0.1  # share of the steps
LAST = 0.1  # of the highest learning rate, at the last step
# On a CPU a batch costs about as much as so many tokens, whatever it holds: passes over weights and gradients.
_BATCH_COST = 64


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


def most_padding(device: torch.device, processes: int) -> int | None:
    """Tokens of padding for which a batch is split on this device; None: it is not.

    On a GPU a batch costs as much as a thousand tokens and more, and of several processes each takes its part of every batch.
    """
    return _BATCH_COST if device.type == "cpu" and processes == 1 else None


def steps_of_run(
    training: Sequence[TokenSequence],
    settings: RecoverySettings,
    device: torch.device,
    processes: int,
) -> list[Step]:
    """The steps of a run of so many processes that trains on this device."""
    return plan_steps(
        training,
        step_tokens=settings.step_tokens,
        batch_tokens=settings.batch_tokens,
        passes=settings.passes,
        seed=settings.seed,
        most_padding=most_padding(device, processes),
    )


def plan_steps(
    sequences: Sequence[TokenSequence],
    *,
    step_tokens: int,
    batch_tokens: int,
    passes: int,
    seed: int,
    most_padding: int | None = None,
) -> list[Step]:
    """Each pass over `sequences` in a new random order, about `step_tokens` tokens per step.

    Within a step sequences of like length share a micro-batch of at most `batch_tokens` padded tokens, and one for which the
    others would be padded by more than `most_padding` tokens begins a new one. Steps are not sorted by length: that would
    separate the kinds of problems.
    """
    steps: list[Step] = []
    for number in range(passes):
        order = list(sequences)
        random.Random(f"{seed}/{number}").shuffle(order)
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
