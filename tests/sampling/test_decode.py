"""Decoding a batch from which ended rows are taken out, against one forward pass per token of each row alone."""

import pytest
import torch

from rac_modifier.sampling.decode import decode
from rac_modifier.sampling.draw import Draw
from rac_modifier.sampling.row_noise import gumbel_noise, row_keys
from tests.tiny import tiny_model

EOS = [1, *range(118, 128)]
PROMPTS = [
    [2, 40, 50],
    [2, 60],
    [2, 10, 11, 12, 13, 14, 15, 16],
    [2, 33, 34, 35, 36],
    [2, 9],
    [2, 71, 72],
]
LIMITS = [24, 3, 20, 24, 1, 24]


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=128)


def alone(model, prompt, limit, key, temperature):
    ids = list(prompt)
    for step in range(limit):
        scores = model(torch.tensor([ids])).logits[:, -1]
        if temperature:
            scores = scores / temperature
            scores = scores + gumbel_noise(key[None], step, torch.arange(128))
        ids.append(int(scores.argmax()))
        if ids[-1] in EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_each_row_is_what_it_is_alone(model, temperature):
    keys = row_keys(5, [f"k{i}" for i in range(len(PROMPTS))])
    rows = decode(model, PROMPTS, limits=LIMITS, eos=EOS, pad=0, draw=Draw(temperature), rows=keys)
    expected = [
        alone(model, *each, temperature) for each in zip(PROMPTS, LIMITS, keys, strict=True)
    ]
    assert [row[: len(e)] for row, e in zip(rows, expected, strict=True)] == expected
    assert [len(row) for row in rows] == LIMITS
    if temperature:
        assert len({len(e) for e in expected}) > 3  # rows do end at different times


def test_ended_rows_are_not_computed(model, monkeypatch):
    """Once a quarter of the rows have ended; the last step has the one row that is left."""
    sizes = []
    forward = model.forward

    def counting(input_ids, **options):
        sizes.append(len(input_ids))
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", counting)
    limits = [2, 3, 4, 5, 6, 7, 8, 20]
    prompts = [[2, 40 + i] for i in range(8)]
    decode(
        model,
        prompts,
        limits=limits,
        eos=[],
        pad=0,
        draw=Draw(0.0),
        rows=torch.zeros(8, dtype=torch.int64),
    )
    assert len(sizes) == 20
    assert sizes[:2] == [8, 8]
    assert sizes[-1] == 1
    assert all(
        size <= sum(limit > step for limit in limits) / 0.75 for step, size in enumerate(sizes)
    )
