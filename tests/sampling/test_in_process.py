"""The model in memory as an engine: in this process, and in several that share the batches."""

import pytest

from rac_modifier.sampling import in_process
from rac_modifier.sampling.engine import Prompt
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.in_process import InProcessEngine, end_sampling, help_sampling
from rac_modifier.settings.sampling import SamplingSettings
from tests.meeting import together
from tests.tiny import tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=12, batch_size=3)
SHARED = SAMPLING.model_copy(update={"max_new_tokens": 6, "batch_size": 2})
BATCHES = [
    [Prompt(f"p{i}#{j}", tuple([2, 40 + i] * (1 + j))) for j in range(2 if i < 4 else 1)]
    for i in range(5)
]
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


@pytest.mark.parametrize("count", [2, 3])
def test_it_gives_what_one_process_gives(count, monkeypatch):
    model, tokenizer = tiny_model(vocab_size=128), tiny_tokenizer()
    alone = [
        list(some) for some in InProcessEngine(model, tokenizer, SHARED).iter_completions(BATCHES)
    ]
    generate, completed = in_process.generate, []

    def counting(model, tokenizer, prompts, settings, keys):
        completed.append(keys)
        return generate(model, tokenizer, prompts, settings, keys)

    monkeypatch.setattr(in_process, "generate", counting)

    def run(processes):
        if processes.is_first:
            found = list(
                InProcessEngine(model, tokenizer, SHARED, processes).iter_completions(iter(BATCHES))
            )
            end_sampling(processes, {"path": "x"})
            return [list(some) for some in found]
        return help_sampling(model, tokenizer, processes)

    first, *others = together(count, run)
    assert first == alone
    assert others == [{"path": "x"}] * (count - 1)
    assert sorted(completed) == [
        [prompt.key for prompt in batch] for batch in BATCHES
    ]  # each in one process only


def test_batches_are_taken_as_there_are_processes():
    """A store is filled up to a budget, so no more is sampled than that."""
    model, tokenizer = tiny_model(vocab_size=128), tiny_tokenizer()
    taken = []

    def batches():
        for batch in BATCHES:
            taken.append(batch)
            yield batch

    def run(processes):
        if processes.is_first:
            engine = InProcessEngine(model, tokenizer, SHARED, processes)
            next(engine.iter_completions(batches()))
            end_sampling(processes, None)
            return len(taken)
        return help_sampling(model, tokenizer, processes)

    assert together(2, run) == [2, None]
