"""The model in memory as an engine: in this process, and in several that share the batches."""

import json

import pytest
from pydantic import ValidationError

from rac_modifier.sampling import engine as engines
from rac_modifier.sampling.engine import (
    EngineRecord,
    InProcessEngine,
    Probe,
    Prompt,
    end_sampling,
    help_sampling,
)
from rac_modifier.sampling.generate import generate
from rac_modifier.settings.sampling import SamplingSettings
from tests.meeting import together

SAMPLING = SamplingSettings(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=6, batch_size=2)
BATCHES = [
    [Prompt(f"p{i}#{j}", tuple([2, 40 + i] * (1 + j))) for j in range(2 if i < 4 else 1)]
    for i in range(5)
]


@pytest.fixture
def completed(monkeypatch):
    """The keys of each batch that was computed, in any process."""
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
        assert [answer.prompt for answer in answers] == batch
        assert completed == [[p.key for p in batch] for batch in BATCHES[:count]]
        for answer in answers:
            ids, key = list(answer.prompt.ids), answer.prompt.key
            assert answer.outcome == generate(model, tokenizer, [ids], SAMPLING, [key])[0]
    assert next(completions, None) is None


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_give_what_one_gives_and_take_no_more_than_they_need(
    model, tokenizer, count, completed
):
    alone = list(InProcessEngine(model, tokenizer, SAMPLING).iter_completions(BATCHES))
    completed.clear()
    taken = []

    def batches():
        for batch in BATCHES:
            taken.append(batch)
            yield batch

    def run(processes):
        if not processes.is_first:
            return help_sampling(model, tokenizer, processes)
        engine = InProcessEngine(model, tokenizer, SAMPLING, processes)
        completions = engine.iter_completions(batches())
        first = next(completions)
        assert len(taken) == count
        answers = [first, *completions]
        end_sampling(processes, {"path": "x"})
        return answers

    first, *others = together(count, run)
    assert first == alone
    assert others == [{"path": "x"}] * (count - 1)
    assert sorted(completed) == [[p.key for p in batch] for batch in BATCHES], "each once"


def test_the_record_in_the_header_of_a_store():
    probe = Probe(prompt_ids=(1, 2), completion_ids=(3,))
    record = EngineRecord(kind="openai", served_model="m", root="/models/m", probes=(probe,))
    assert EngineRecord(**json.loads(json.dumps(record.model_dump()))) == record
    for fields in ({"kind": "vllm"}, {"url": "http://a"}, {"probes": [{"prompt_ids": [1]}]}):
        with pytest.raises(ValidationError):
            EngineRecord(**fields)
