"""Which model a server holds: by its list, its files and its greedy tokens."""

import json
from pathlib import Path

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.reasoner import reasoner_path
from rac_modifier.sampling.engine import Probe
from rac_modifier.sampling.probes import check_limit, check_name, check_probes, served_model
from tests.tiny import tiny_model


def listed(*cards):
    return json.dumps({"object": "list", "data": cards}).encode()


BASE, ADAPTER = {"id": "a", "root": "/m"}, {"id": "b", "parent": "a"}


def test_the_only_model_or_the_named_one_is_sampled():
    assert served_model(listed(BASE, ADAPTER), None, "s") == BASE
    assert served_model(listed(BASE, {"id": "c"}), "c", "s") == {"id": "c"}


@pytest.mark.parametrize(
    ("content", "wanted", "words"),
    [
        (listed(BASE), "x", "s does not serve 'x', but 'a'; set engine.model"),
        (listed(), None, "s serves none; set engine.model"),
        (listed(BASE, {"id": "c"}), None, "s serves 'a', 'c'; set engine.model"),
        (listed(BASE, ADAPTER), "b", "'b' is an adapter on 'a'"),
        (b"<html>", None, "s/models is not a list of models"),
        (b'{"data": [1]}', None, "s/models is not a list of models"),
        (b"[]", None, "s/models is not a list of models"),
        (b"[" * 100_000, None, "s/models is not a list of models"),
    ],
)
def test_a_list_without_the_model(content, wanted, words):
    with pytest.raises(RacError, match=words):
        served_model(content, wanted, "s")


@pytest.mark.parametrize(
    ("root", "model"),
    [
        ("/models/reasoner", "/home/reasoner"),
        ("org/Name", "org/name"),
        ("/cache/models--org--name/snapshots/4f2a", "org/name"),
        ("org/name", "/data/name"),
        (".", "/data/name"),
        (None, "/data/name"),
        ("", "/data/name"),
        ("/models/reasoner", ""),
        (f"/models/{Path.cwd().name}", "."),
        ("/models/reasoner", reasoner_path()),
        (reasoner_path(), reasoner_path()),
    ],
)
def test_one_model_in_two_places_passes(root, model):
    check_name({"id": "a", "root": root}, model, "s")


@pytest.mark.parametrize(
    ("root", "model"),
    [
        ("/models/reasoner", "/models/reasoner-2of4"),
        ("org/name", "other/name-FP8"),
        ("/cache/models--org--name/snapshots/4f2a", "/cache/models--org--name-int4/snapshots/4f2a"),
        ("/models/reasoner", "."),
    ],
)
def test_a_model_of_another_name_is_refused(root, model):
    words = r"s serves '.+', and the model is '.+'; .* set engine\.model \(rac eval: --served-as\) to 'a'"
    with pytest.raises(RacError, match=words):
        check_name({"id": "a", "root": root}, model, "s")


@pytest.mark.parametrize(
    ("limit", "context", "wanted", "fits"),
    [
        (512, 512, 1000, True),
        (100, 512, 100, False),
        (101, 512, 100, True),
        (100, None, 100, False),
        (None, 9, 9, True),
    ],
)
def test_the_servers_limit_must_hold_a_chain_of_thought(limit, context, wanted, fits):
    card = {"root": "/models/elsewhere", "max_model_len": limit}
    if fits:
        check_limit(card, context, wanted, "s")
        return
    with pytest.raises(
        RacError, match=f"s takes sequences of up to {limit} tokens, and max_new_tokens={wanted}"
    ):
        check_limit(card, context, wanted, "s")


PROMPT = list(range(3, 20))


def greedy(model):
    ids = torch.tensor([PROMPT])
    for _ in range(12):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return Probe(prompt_ids=tuple(PROMPT), completion_ids=tuple(ids[0, len(PROMPT) :].tolist()))


def test_the_same_weights_in_bfloat16_pass_and_others_do_not():
    model = tiny_model().train()
    check_probes(model, [greedy(tiny_model().to(torch.bfloat16))], "s")
    assert model.training
    with pytest.raises(
        RacError, match=r"s holds another model than 'Qwen3ForCausalLM': .* of its 24 greedy tokens"
    ):
        check_probes(model, [greedy(tiny_model()), greedy(tiny_model(seed=1))], "s")


def test_a_token_may_be_one_nat_less_likely_than_the_models_choice():
    """Log-probabilities of a head without a model: the choice is token 0, the others are less likely by their weight."""
    model = tiny_model(vocab_size=8)
    below = torch.tensor([0.0, 0.9, 1.1, float("nan"), 9, 9, 9, 9])

    class Head(torch.nn.Module):
        config, device, training = model.config, model.device, False

        def forward(self, input_ids):
            return type("Output", (), {"logits": -below.repeat(1, input_ids.shape[1], 1)})

    def probe(*ids):
        return Probe(prompt_ids=(1, 2), completion_ids=ids)

    below[3] = 9
    check_probes(Head(), [probe(0, 1, 1, 0)], "s")
    with pytest.raises(RacError, match=r"1 of its 3 greedy tokens .*up to 1\.1 nats"):
        check_probes(Head(), [probe(0, 2, 0)], "s")
    below[1] = float("nan")
    with pytest.raises(RacError, match="holds another model"):
        check_probes(Head(), [probe(1)], "s")
