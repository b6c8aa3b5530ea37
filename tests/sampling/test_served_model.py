"""The engine on servers: whether they hold the model that is asked for, by its entry, its files and its greedy tokens."""

import contextlib

import pytest

from rac_modifier.errors import RacError
from rac_modifier.sampling.generate import generate
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.sampling.openai_server import ServerEngine
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from tests.sampling.conftest import SAMPLING
from tests.sampling.fake_server import NAME
from tests.tiny import save_tiny, tiny_model


@pytest.mark.parametrize(
    ("cards", "engine", "words"),
    [
        ([{"id": "other"}], {"model": "tiny"}, "does not serve 'tiny', but 'other'"),
        ([{"id": "a"}, {"id": "b"}], {}, "serves 'a', 'b'; set engine.model"),
        ([{"id": "a", "parent": "b"}], {"model": "a"}, "adapter"),
        ([{"id": "a", "max_model_len": 20}], {}, "--max-model-len"),
    ],
)
def test_another_model_is_refused_by_its_entry(make, server, cards, engine, words):
    server.cards = cards
    with pytest.raises(RacError, match=words):
        make(**engine).connect()


@pytest.mark.parametrize(
    ("folder", "verify", "words"),
    [
        ("own", True, "does not answer a short greedy prompt"),
        ("other", True, "serves 'other', and the model is 'own'"),
        ("other", False, None),
    ],
)
def test_a_folder_of_another_name_is_refused_where_the_weights_are_elsewhere(
    server, tokenizer, tmp_path, folder, verify, words
):
    identity = ModelIdentity.of_files(str(save_tiny(tmp_path / "own")))
    server.cards[0]["root"] = server.cards[0]["id"] = str(tmp_path / folder)
    server.fault = lambda number, body: "400"
    settings = EngineSettings(base_urls=(server.url,), verify_model=verify)
    with contextlib.closing(ServerEngine(settings, identity, tokenizer, SAMPLING)) as engine:
        if words is None:
            record = engine.connect()  # no folder of this machine is in it
            assert (record.root, record.served_model) == (folder, folder)
            return
        with pytest.raises(RacError, match=words):
            engine.connect()


def test_the_record_holds_greedy_tokens_where_the_model_is_checked(make, server, tokenizer):
    model = tiny_model()

    def greedy(body):
        settings = SamplingSettings(temperature=0, max_new_tokens=body["max_tokens"])
        return list(generate(model, tokenizer, [body["prompt"]], settings, [""])[0].ids)

    server.answer = greedy
    record = make(verify_model=True, weights=model).connect()
    assert (record.kind, record.served_model, record.root, len(record.probes)) == (
        "openai",
        NAME,
        "tiny",
        4,
    )
    assert all(
        list(p.completion_ids) == greedy({"prompt": list(p.prompt_ids), "max_tokens": 24})
        for p in record.probes
    )
    assert make().connect().probes == ()
    with pytest.raises(RacError, match=r"holds another model than .*verify_model: false"):
        make(verify_model=True, weights=tiny_model(seed=1)).connect()
    server.fault = lambda number, body: "500"
    with pytest.raises(
        RacError, match=r"does not answer a short greedy prompt: .*told to answer 500"
    ):
        make(verify_model=True).connect()
