"""The model in memory as an engine, and the record of an engine."""

import pytest

from rac_modifier.sampling import engine as engines
from rac_modifier.sampling.engine import InProcessEngine, Prompt
from rac_modifier.sampling.generate import generate
from rac_modifier.settings.sampling import SamplingSettings

SAMPLING = SamplingSettings(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=6, batch_size=2)
BATCHES = [
    [Prompt(f"p{i}#{j}", tuple([2, 40 + i] * (1 + j))) for j in range(2 if i < 4 else 1)]
    for i in range(5)
]


@pytest.fixture
def completed(monkeypatch):
    """The keys of each batch that was computed."""
    keys_of_batches = []

    def counting(model, tokenizer, prompts, settings, keys):
        keys_of_batches.append(keys)
        return generate(model, tokenizer, prompts, settings, keys)

    monkeypatch.setattr(engines, "generate", counting)
    return keys_of_batches


def test_a_batch_is_computed_together_and_only_when_it_is_wanted(model, tokenizer, completed):
    """Rounding depends on the shape of a batch, so batches are never joined or cut."""
    completions = InProcessEngine(model, tokenizer, SAMPLING).iter_completions(iter(BATCHES))
    assert completed == []
    for count, batch in enumerate(BATCHES, 1):
        answers = next(completions)
        assert [prompt for prompt, _ in answers] == batch
        assert completed == [[p.key for p in batch] for batch in BATCHES[:count]]
        for prompt, outcome in answers:
            ids, key = list(prompt.ids), prompt.key
            assert outcome == generate(model, tokenizer, [ids], SAMPLING, [key])[0]
    assert next(completions, None) is None
