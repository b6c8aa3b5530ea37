"""Greedy answers of a tiny model that end in copies of what they said before."""

import pytest
import torch

from rac_modifier.recovery import checkpoint
from rac_modifier.recovery.checkpoint import copying_answers
from rac_modifier.sampling.generate import Generation
from rac_modifier.settings.sampling import SamplingSettings
from tests.recovery.recovery_helpers import sequences
from tests.tiny import tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(max_new_tokens=400, batch_size=4, temperature=1.0)
TRAINING = [([*ids, *range(5, 205)], prompt) for ids, prompt in sequences(24)]


@pytest.fixture(scope="module")
def model():
    """Its next token depends on the last one alone, so greedy answers soon repeat."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    return model


def greedy(model, prompt, count):
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + count and ids[-1] != 1:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids


def test_greedy_answers_are_cut_behind_a_few_copies(model, tmp_path):
    answers = copying_answers(model, tiny_tokenizer(), TRAINING, SAMPLING, tmp_path / "own.json")
    assert answers
    prompts = [tuple(ids[:n]) for ids, n in TRAINING]
    for ids, prompt in answers:
        assert tuple(ids[:prompt]) in prompts
        assert list(ids) == greedy(model, ids[:prompt], len(ids) - prompt)
        completion = list(ids[prompt:])
        period = next(p for p in range(1, 129) if completion[-p:] == completion[-2 * p : -p])
        assert completion[-64:] == completion[-64 - period : -period]
        assert len(completion) < 400


def test_a_run_that_was_killed_samples_them_once(model, tmp_path, monkeypatch):
    path, tokenizer = tmp_path / "own.json", tiny_tokenizer()
    answers = copying_answers(model, tokenizer, TRAINING, SAMPLING, path)
    calls = []
    inner = checkpoint.generate
    monkeypatch.setattr(checkpoint, "generate", lambda *a: calls.append(1) or inner(*a))
    assert copying_answers(model, tokenizer, TRAINING, SAMPLING, path) == answers
    assert not calls
    other = tiny_model(1)
    assert copying_answers(other, tokenizer, TRAINING, SAMPLING, path) != answers
    assert calls
    ended = Generation((8, 1), "stop")
    monkeypatch.setattr(
        checkpoint, "generate", lambda m, t, prompts, *a: calls.append(1) or [ended] * len(prompts)
    )
    for tokens in (400, 90):  # other prompts, and then another cap
        calls.clear()
        sampling = SAMPLING.model_copy(update={"max_new_tokens": tokens})
        copying_answers(other, tokenizer, TRAINING[1:], sampling, path)
        assert calls, tokens


@pytest.mark.parametrize(
    ("size", "looping", "expected", "batches"),
    [(5, 0, 0, [5]), (5, 1, 4, [5] * 4), (10, 1, 2, [10, 10]), (11, 1, 0, [11])],
)
def test_copies_that_are_seldom_are_left_alone(
    size, looping, expected, batches, model, tmp_path, monkeypatch
):
    """Of twenty prompts; where fewer than a tenth of a batch loops, nothing more is sampled."""
    calls = []

    def generate(model, tokenizer, prompts, settings, keys):
        assert settings.max_new_tokens == 398  # twice the tokens of a completion
        calls.append(len(prompts))
        ends = [Generation((7,) * 300, "length")] * looping
        return [*ends, *[Generation((8, 1), "stop")] * (len(prompts) - looping)]

    monkeypatch.setattr(checkpoint, "generate", generate)
    sampling = SAMPLING.model_copy(update={"batch_size": size})
    training = [([*range(5, 205), n], 4) for n in range(5)]
    training = [([n, *ids], prompt) for n in range(5, 9) for ids, prompt in training]
    training = [([n, *ids], prompt) for n in range(5, 10) for ids, prompt in training]
    answers = copying_answers(model, tiny_tokenizer(), training, sampling, tmp_path / "own.json")
    assert (len(answers), calls) == (expected, batches)
