"""A tiny dense model, a sparse copy of it, and traces for both."""

import copy
import hashlib
from typing import Any

import torch

from rac_modifier.recovery.distill import recover
from rac_modifier.recovery.loss import predicting_states
from rac_modifier.settings.recovery import RecoverySettings
from tests.tiny import linears, tiny_model

Sequences = list[tuple[list[int], int]]
SETTINGS = RecoverySettings(learning_rate=3e-3, step_tokens=300, batch_tokens=400)


class Killed(BaseException):
    """Ends a run as a kill does: nothing else runs."""


def dense_and_sparse(seed: int = 0) -> tuple[Any, Any]:
    """The dense model, and a copy whose linear layers, not the head, lost the smaller half."""
    dense = tiny_model(seed)
    sparse = copy.deepcopy(dense)
    for linear in linears(sparse).values():
        weight = linear.weight.data
        weight[weight.abs() < weight.abs().median()] = 0.0
    return dense, sparse


def sequences(count: int, seed: int = 0) -> Sequences:
    """Random token ids of 12 to 40 tokens with prompts of 3 to 8."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    return [
        (torch.randint(5, 300, (number(12, 41),), generator=generator).tolist(), number(3, 9))
        for _ in range(count)
    ]


def kl_of(dense: Any, model: Any, data: Sequences) -> float:
    """Mean KL(dense || model) per completion token, in float64 from whole logits."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids, prompt in data:
            x = torch.tensor([ids])
            p = dense(x).logits[0, prompt - 1 : -1].double().log_softmax(-1)
            q = model(x).logits[0, prompt - 1 : -1].double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
            tokens += len(ids) - prompt
    return total / tokens


class LiveTeacher:
    """The dense model in memory, with the methods of `StoredTeacher`."""

    def __init__(self, dense: Any):
        self._dense = dense

    @property
    def key(self) -> str:
        """A hash of the weights."""
        digest = hashlib.blake2b(digest_size=16)
        for parameter in self._dense.parameters():
            digest.update(parameter.detach().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def states(self, batch: Sequences) -> torch.Tensor:
        return predicting_states(self._dense, batch)


def run(model, dense, settings=SETTINGS, counts=(40, 10), **options):
    """Recover `model` on so many random training and held-out sequences."""
    traces = {"training": sequences(counts[0], seed=1), "held_out": sequences(counts[1], seed=2)}
    options = traces | options
    return recover(model, LiveTeacher(dense), settings=settings, **options)


def assert_same_weights(a: Any, b: Any) -> None:
    """Every parameter is equal, bit for bit."""
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
