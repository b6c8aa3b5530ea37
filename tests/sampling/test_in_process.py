"""The model in this process as an engine."""

import pytest

from rac_modifier.sampling import in_process
from rac_modifier.sampling.engine import Prompt
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.in_process import InProcessEngine
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=12, batch_size=3)
PROMPTS = [Prompt(f"p{i}#0", tuple([2, 40 + i] * (1 + i % 3))) for i in range(5)]


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=128)


def test_a_completion_is_what_generate_gives_for_the_key_alone(model):
    tokenizer = tiny_tokenizer()
    engine = InProcessEngine(model, tokenizer, SAMPLING)
    yielded = list(engine.iter_completions([PROMPTS[:3], PROMPTS[3:]]))
    assert [[c.prompt for c in some] for some in yielded] == [PROMPTS[:3], PROMPTS[3:]]
    for completion in (c for some in yielded for c in some):
        prompt = completion.prompt
        assert (
            completion.outcome
            == generate(model, tokenizer, [list(prompt.ids)], SAMPLING, [prompt.key])[0]
        )
    engine.close()


def test_a_batch_is_computed_together_and_only_when_it_is_wanted(model, monkeypatch):
    """Rounding depends on the shape of a batch, so batches are never joined or cut."""
    sizes = []

    def counting(model, tokenizer, prompts, settings, keys):
        sizes.append(len(prompts))
        return generate(model, tokenizer, prompts, settings, keys)

    monkeypatch.setattr(in_process, "generate", counting)
    finished = InProcessEngine(model, tiny_tokenizer(), SAMPLING).iter_completions(
        iter([PROMPTS[:1], PROMPTS[1:]])
    )
    assert sizes == []
    next(finished)
    assert sizes == [1]
    assert len(next(finished)) == 4
    assert sizes == [1, 4]
    assert next(finished, None) is None


def test_its_record(model):
    engine = InProcessEngine(model, tiny_tokenizer(), SAMPLING)
    record = engine.connect()
    assert (record.kind, record.probes, engine.kind, engine.batch_size) == (
        "transformers",
        (),
        "transformers",
        3,
    )
