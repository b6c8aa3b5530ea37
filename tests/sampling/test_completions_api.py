"""What is asked, which answers count, and which model a server holds."""

import json
from pathlib import Path

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.sampling.completions_api import (
    Request,
    ServedModel,
    UnusableError,
    check_probes,
    trace_seed,
)
from rac_modifier.sampling.engine import Probe
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import tiny_model

REQUEST = Request((3, 4), 4, 0, (1, 2))


def answer(*, usage=None, **choice):
    whole = {"token_ids": [5, 6, 1], "prompt_token_ids": [3, 4], "finish_reason": "stop", **choice}
    return json.dumps({"choices": [whole], "usage": usage}).encode()


@pytest.mark.parametrize(
    ("content", "ids", "reason"),
    [
        (answer(), (5, 6, 1), "stop"),
        (answer(prompt_token_ids=None, usage={"completion_tokens": 3}), (5, 6, 1), "stop"),
        (answer(token_ids=[5, 6, 7, 8], finish_reason="length"), (5, 6, 7, 8), "length"),
        (answer(token_ids=[5, 6, 7, 2], finish_reason="length"), (5, 6, 7, 2), "stop"),
        (answer(token_ids=[5, 6, 7, 2]), (5, 6, 7, 2), "stop"),
    ],
)
def test_an_answer_is_taken_as_it_is(content, ids, reason):
    completion = REQUEST.read(content, 10, "s")
    assert (completion.ids, completion.finish_reason) == (ids, reason)


@pytest.mark.parametrize(
    "content",
    [
        answer(token_ids=[]),
        answer(token_ids=[5, 6, 10]),
        answer(token_ids=[5, True, 1]),
        answer(usage={"completion_tokens": 4}),
        answer(token_ids=[5, 6, 7, 8, 1]),
        answer(token_ids=[5], finish_reason="length"),
        answer(finish_reason="abort"),
        *(answer(prompt_token_ids=ids) for ids in (2, True, "34", {"ids": [3, 4]})),
        b'{"choices": []}',
        b'{"choices": [1], "usage": {}}',
        b"\xff",
    ],
)
def test_answers_to_ask_for_again(content):
    with pytest.raises(UnusableError):
        REQUEST.read(content, 10, "s")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (answer(token_ids=None), "s returned text without token ids.*return_token_ids"),
        (answer(prompt_token_ids=[4]), r"s read another prompt than .* \(1 tokens, not 2\)"),
        (answer(token_ids=[5, 6]), r"ended a completion on token 6, which is no EOS \(1, 2\)"),
        (answer(token_ids=[5, 2, 6, 1]), "continued a completion .* switch off `ignore_eos`"),
    ],
)
def test_answers_that_another_try_does_not_mend(content, words):
    with pytest.raises(RacError, match=words):
        REQUEST.read(content, 10, "s")


def test_the_request_leaves_nothing_to_the_servers_defaults():
    assert REQUEST.body(SamplingSettings(temperature=0.6, top_p=0.95, top_k=20)) == {
        "prompt": [3, 4], "max_tokens": 4, "temperature": 0.6, "top_p": 0.95,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "seed": 0, "stream": False, "n": 1,
        "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [1, 2],
        "return_token_ids": True,
    }  # fmt: skip
    assert REQUEST.body(SamplingSettings(temperature=0.6, top_p=0.95, top_k=0))["top_k"] == -1


def test_seeds_follow_seed_and_key():
    seeds = {trace_seed(seed, f"p{i}#0") for seed in range(3) for i in range(300)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert trace_seed(1, "a") == trace_seed(1, "a")
    assert (
        trace_seed(0, "addition:1,2#0") == 2074697376
    )  # stores that exist were sampled with these


def listed(*cards):
    return json.dumps({"object": "list", "data": cards}).encode()


BASE, ADAPTER = {"id": "a", "root": "/m"}, {"id": "b", "parent": "a"}


def test_the_only_model_or_the_named_one_is_sampled():
    assert ServedModel.of(listed(BASE, ADAPTER), None, "s").card == BASE
    assert ServedModel.of(listed(BASE, {"id": "c"}), "c", "s").card == {"id": "c"}


@pytest.mark.parametrize(
    ("content", "wanted", "words"),
    [
        (listed(BASE), "x", "s does not serve 'x', but 'a'; set engine.model"),
        (listed(), None, "s serves none; set engine.model"),
        (listed(BASE, {"id": "c"}), None, "s serves 'a', 'c'; set engine.model"),
        (
            listed(*({"id": f"m{i}"} for i in range(10**5))),
            None,
            r"\As serves 'm0'.* 'm9' and 99,990 o.{,70}\Z",
        ),
        (listed({"id": "x" * 10**6}), None, r"\As has a model with a name .{,350}\Z"),
        (listed({"id": "\ud800\x1b[2J"}), None, r"cannot be used: '\\+ud800\\+x1b\[2J'"),
        (listed(BASE, ADAPTER), "b", "'b' is an adapter on 'a'"),
        (b"<html>", None, "s/models is not a list of models"),
        (b"[" * 100_000, None, "s/models is not a list of models"),
    ],
)
def test_a_list_without_the_model(content, wanted, words):
    with pytest.raises(RacError, match=words):
        ServedModel.of(content, wanted, "s")


@pytest.mark.parametrize(
    ("root", "model", "same"),
    [
        ("/models/reasoner", "/home/reasoner", True),
        ("/cache/models--org--Name/snapshots/4f2a", "org/name", True),
        (None, "/data/name", True),
        (f"/models/{Path.cwd().name}", ".", True),
        ("/models/reasoner", "/models/reasoner-2of4", False),
        ("/cache/models--a--b/snapshots/4f2a", "/cache/models--a--b-int4/snapshots/4f2a", False),
    ],
)
def test_a_model_of_another_name_is_refused(root, model, same):
    card = {"id": "a", "root": root}
    if same:
        ServedModel("s", card).check_name(model)
        return
    words = r"s serves '.+', and the model is '.+'; .* set engine\.model .*--served-as\) to 'a'"
    with pytest.raises(RacError, match=words):
        ServedModel("s", card).check_name(model)


def test_the_servers_limit_must_hold_a_chain_of_thought():
    for limit, context, wanted in ((512, 512, 1000), (101, 512, 100), (None, 9, 9)):
        ServedModel("s", {"max_model_len": limit}).check_limit(context, wanted)
    for context in (512, None):
        with pytest.raises(RacError, match="s takes sequences of up to 100 tokens, and"):
            ServedModel("s", {"max_model_len": 100}).check_limit(context, 100)


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
        RacError, match=r"s holds another model than 'Qwen3.*': .* of its 24 greedy"
    ):
        check_probes(model, [greedy(tiny_model()), greedy(tiny_model(seed=1))], "s")


def test_a_token_may_be_one_nat_less_likely_than_the_models_choice():
    """Log-probabilities of a head without a model: the choice is token 0, the others are less
    likely by their weight."""
    model = tiny_model(vocab_size=8)
    below = torch.tensor([0.0, 0.9, 1.1, 9, 9, 9, 9, 9])

    class Head(torch.nn.Module):
        config, device, training = model.config, model.device, False

        def forward(self, input_ids):
            return type("Output", (), {"logits": -below.repeat(1, input_ids.shape[1], 1)})

    def probe(*ids):
        return Probe(prompt_ids=(1, 2), completion_ids=ids)

    check_probes(Head(), [probe(0, 1, 1, 0)], "s")
    with pytest.raises(RacError, match=r"1 of its 3 greedy tokens .*up to 1\.1 nats"):
        check_probes(Head(), [probe(0, 2, 0)], "s")
    below[1] = float("nan")
    with pytest.raises(RacError, match="holds another model"):
        check_probes(Head(), [probe(1)], "s")
