"""Collecting from a server that works, and whether it holds the right model. Faults: test_collect_through_faults.py."""

import pytest
from transformers import AutoModelForCausalLM

from rac_modifier.calibration.calibration_set import build_calibration_set
from rac_modifier.calibration.trace_budget import collect_for_calibration
from rac_modifier.errors import RacError
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.settings.traces import TraceSettings
from tests.sampling.fake_server import NAME, rule
from tests.tiny import tiny_model


def test_the_store_holds_what_the_server_generated(collect, server, is_exact):
    store = collect()
    last = list(store)[-1]
    assert store.counts.tokens >= 3000 > store.counts.tokens - last.tokens
    assert is_exact(store)
    assert 0 < store.counts.finished < len(store)
    assert (store.header.engine.kind, store.header.engine.served_model) == ("openai", NAME)
    body = server.bodies[0]
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"]) == (
        1.0,
        0.95,
        -1,
        1.0,
    )
    assert body["return_token_ids"] is True
    assert 1 < server.most_at_once <= 8


def test_a_store_that_holds_enough_asks_nobody(collect, server):
    before = collect()
    server.close()
    assert collect(tokens=2000).sha256() == before.sha256()


def greedy(model, tokenizer):
    """What a server that holds this model answers."""

    def answer(body):
        if body["temperature"] > 0:
            return rule(body)
        settings = SamplingSettings(temperature=0, max_new_tokens=body["max_tokens"])
        return list(generate(model, tokenizer, [body["prompt"]], settings, [""])[0].ids)

    return answer


def test_greedy_tokens_tell_another_model(collect, server, tokenizer):
    model = tiny_model()
    server.answer = greedy(model, tokenizer)
    assert (
        len(collect("a.jsonl", of=model, verify_model=True, tokens=200).header.engine.probes) == 4
    )
    server.answer = greedy(tiny_model(seed=1), tokenizer)
    with pytest.raises(RacError, match=r"holds another model than .*verify_model: false"):
        collect("b.jsonl", of=model, verify_model=True, tokens=200)
    collect("b.jsonl", of=model, tokens=200)


def test_a_store_collected_without_the_weights_is_checked_once_they_are_there(
    collect, server, tokenizer
):
    server.answer = greedy(tiny_model(seed=1), tokenizer)
    collect(verify_model=True, tokens=200)
    with pytest.raises(
        RacError, match=r"the server that filled trace store .*s\.jsonl.* another model"
    ):
        collect(of=tiny_model(), verify_model=True, tokens=200)


def test_two_kinds_of_engines_do_not_fill_one_store(collect):
    """Both may read it."""
    collect(tokens=300)
    model = tiny_model()
    assert collect(of=model, engine=False, tokens=300).counts.tokens >= 300
    with pytest.raises(
        RacError, match=r"another engine \(openai, not transformers\).*traces.engine"
    ):
        collect(of=model, engine=False, tokens=5000)


def test_weights_that_are_not_there_need_a_server(collect):
    with pytest.raises(RacError, match="not in memory"):
        collect(engine=False)


@pytest.mark.parametrize("cards", [[{"id": "a"}, {"id": "b"}], [{"id": "a", "max_model_len": 20}]])
def test_a_server_that_is_refused_leaves_no_store(collect, server, tmp_path, cards):
    server.cards = cards
    with pytest.raises(RacError, match=r"engine\.model|--max-model-len"):
        collect()
    assert list(tmp_path.iterdir()) == []


def test_pruning_finds_what_was_collected_without_the_weights(
    server, tiny_folder, tokenizer, tmp_path, monkeypatch
):
    """As `rac traces collect` and `rac prune` with one recipe: the same store by default, and no server in the end."""
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    server.answer, server.cards[0]["root"] = greedy(model, tokenizer), str(tiny_folder)
    engine = {"base_urls": [server.url], "concurrency": 4}
    settings = TraceSettings(sampling={"temperature": 1.0, "max_new_tokens": 20}, engine=engine)
    budget = CalibrationSettings(tokens=400, max_sequence_tokens=40, held_out_tokens=0)
    identity = ModelIdentity.of_files(str(tiny_folder))
    collected = collect_for_calibration(identity, tokenizer, settings, budget, progress=False)[
        "traces"
    ].store
    server.close()
    found = build_calibration_set(model, tokenizer, settings, budget, progress=False)
    assert found.pools["traces"].store.path == collected.path
    assert found.as_dict()["trace_stores"]["traces"]["sha256"] == collected.sha256()
    assert found.loader.composition.tokens == 400
    in_process = settings.model_copy(update={"engine": None})
    again = build_calibration_set(model, tokenizer, in_process, budget, progress=False)
    assert again.pools["traces"].store.path == collected.path
