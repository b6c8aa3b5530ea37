"""Draws against transformers' warpers, which sort the whole vocabulary; noise against integers."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rac_modifier.sampling.draw import Draw, _gumbel_noise, row_keys

VOCABULARY = 5000
ROWS = row_keys(1, [f"r{i}" for i in range(64)])
SHAPES = {"peaked": 4.0, "flat": 0.4}  # with the flat one, top-p 0.95 needs thousands of tokens


def logits(spread: float, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(
        len(ROWS), VOCABULARY, generator=torch.Generator().manual_seed(seed)
    )


def warped(scores: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(torch.zeros(len(scores), 1, dtype=torch.int64), scores.clone())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (0.6, 0, 0.95),
        (1.0, 0, 1.0),
        (1.7, 20, 0.8),
        (0.6, 20, 1.0),
        (1.0, 0, 0.999),
        (1.0, 9000, 0.5),
    ],
)
def test_tokens_equal_those_of_a_full_sort(shape, temperature, top_k, top_p):
    draw = Draw(temperature, top_k, top_p)
    for position in range(4):
        scores = logits(SHAPES[shape], seed=position)
        whole = warped(scores, temperature, top_k, top_p) + _gumbel_noise(
            ROWS, position, torch.arange(VOCABULARY)
        )
        assert torch.equal(draw.tokens(scores, ROWS, position), whole.argmax(-1))


def test_temperature_zero_is_the_arg_max_and_half_precision_is_drawn_in_float32():
    scores = logits(4.0).bfloat16()
    assert torch.equal(Draw(0.0, 5, 0.5).tokens(scores, ROWS, 3), scores.argmax(-1))
    drawn = Draw(0.6, 0, 0.95).tokens(scores, ROWS, 0)
    assert torch.equal(drawn, Draw(0.6, 0, 0.95).tokens(scores.float(), ROWS, 0))


MASK = 2**64 - 1


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def reference(row, position, token):
    """The same noise with Python's unbounded integers."""
    bits = mix(
        mix(row + (position + 1) * 0x9E3779B1 & MASK) ^ mix((token + 1) * 0x9E3779B97F4A7C15 & MASK)
    ) & (2**63 - 1)
    return -math.log(-math.log1p(-(bits + 0.5) / 2**63))


def test_equals_the_reference_in_plain_integers():
    rows = row_keys(3, ["a#0", "b#1"])
    for position in (0, 1, 511, 100_000):
        noise = _gumbel_noise(rows, position, torch.arange(40))
        expected = [
            [reference(row, position, token) for token in range(40)] for row in rows.tolist()
        ]
        torch.testing.assert_close(noise, torch.tensor(expected), rtol=1e-4, atol=1e-5)
        ids = torch.tensor([[4, 39, 0], [17, 4, 30]])
        assert torch.equal(_gumbel_noise(rows, position, ids), noise.gather(1, ids))
