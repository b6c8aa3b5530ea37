"""The model in several processes that sample together: what one of them gives, each batch in another process."""

import pytest

from rac_modifier.sampling import shared_engine
from rac_modifier.sampling.engine import Prompt
from rac_modifier.sampling.in_process import InProcessEngine
from rac_modifier.sampling.shared_engine import SharedEngine, end_sampling, help_sampling
from rac_modifier.settings.sampling import SamplingSettings
from tests.meeting import together
from tests.tiny import tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=6, batch_size=2)
BATCHES = [
    [Prompt(f"p{i}#{j}", tuple([2, 40 + i] * (1 + j))) for j in range(2 if i < 4 else 1)]
    for i in range(5)
]


@pytest.mark.parametrize("count", [2, 3])
def test_it_gives_what_one_process_gives(count, monkeypatch):
    model, tokenizer = tiny_model(vocab_size=128), tiny_tokenizer()
    alone = [
        list(some) for some in InProcessEngine(model, tokenizer, SAMPLING).iter_completions(BATCHES)
    ]
    generate, completed = shared_engine.generate, []

    def counting(model, tokenizer, prompts, settings, keys):
        completed.append(keys)
        return generate(model, tokenizer, prompts, settings, keys)

    monkeypatch.setattr(shared_engine, "generate", counting)

    def run(processes):
        if processes.is_first:
            found = list(
                SharedEngine(model, tokenizer, SAMPLING, processes).iter_completions(iter(BATCHES))
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
            engine = SharedEngine(model, tokenizer, SAMPLING, processes)
            next(engine.iter_completions(batches()))
            end_sampling(processes, None)
            return len(taken)
        return help_sampling(model, tokenizer, processes)

    assert together(2, run) == [2, None]
