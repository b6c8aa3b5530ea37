"""The parts of the server engine that need no server: settings, balancing, answers, failures, identity from files."""

import email.utils
import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from rac_modifier.sampling.load_balancer import Balancer, pause, retry_after
from transformers import AutoModelForCausalLM, GenerationConfig

from rac_modifier.errors import RacError
from rac_modifier.sampling import load_balancer as servers
from rac_modifier.sampling.completions_api import Ask, UnusableError, error_text, read_answer, trace_seed
from rac_modifier.sampling.engine import Probe
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.sampling.probes import check_card, check_probes
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.failures import FailedProblem, append_failures, failures_path, forget_failures, read_failures
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

ASK = Ask("m", [3, 4], 4, 0, (1, 2))


def test_addresses_are_completed():
    settings = EngineSettings(base_urls=["http://a:8000", "http://a:8001/", "https://b/v1/", "http://c/proxy/v1"])
    assert settings.base_urls == ("http://a:8000/v1", "http://a:8001/v1", "https://b/v1", "http://c/proxy/v1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_urls": []}, "name at least one server"),
        ({"base_urls": ["localhost:8000"]}, "'localhost:8000' is no address"),
        ({"base_urls": ["http://a:99999"]}, "no address"),
        ({"base_urls": ["http://a/v1?x=1"]}, "no address"),
        ({"base_urls": ["http://me:secret@a"]}, "api_key_env"),
        ({"base_urls": ["http://a", "http://a/v1"]}, "twice"),
        ({"base_urls": ["http://a"], "concurrency": 0}, "greater than or equal to 1"),
        ({"base_urls": ["http://a"], "timeout": float("inf")}, "finite"),
        ({"base_urls": ["http://a"], "url": "x"}, "Extra inputs"),
        ({}, "Field required"),
    ],
)
def test_engine_settings_that_make_no_sense(values, message):
    with pytest.raises(ValidationError) as caught:
        TraceSettings(engine=values)
    assert message in str(caught.value)


def test_every_engine_setting_says_what_it_is():
    assert all(field.description for field in EngineSettings.model_fields.values())
    assert TraceSettings().engine is None


def answer(*, usage=None, **choice):
    made = {"token_ids": [5, 6, 1], "prompt_token_ids": [3, 4], "finish_reason": "stop", **choice}
    return json.dumps({"choices": [made], "usage": usage}).encode()


def test_an_answer_is_taken_as_it_is():
    assert read_answer(ASK, answer(), 10, "s").ids == (5, 6, 1)
    assert (
        read_answer(ASK, answer(prompt_token_ids=None, usage={"completion_tokens": 3}), 10, "s").finish_reason == "stop"
    )
    full = read_answer(ASK, answer(token_ids=[5, 6, 7, 8], finish_reason="length"), 10, "s")
    assert (full.ids, full.finish_reason) == ((5, 6, 7, 8), "length")
    assert read_answer(ASK, answer(token_ids=[5, 6, 7, 2], finish_reason="length"), 10, "s").finish_reason == "stop"


@pytest.mark.parametrize(
    "content",
    [
        answer(token_ids=[]),
        answer(token_ids=[5, 6, 10]),
        answer(token_ids=[5, -1]),
        answer(token_ids=[5, True, 1]),
        answer(token_ids="561"),
        answer(usage={"completion_tokens": 4}),
        answer(token_ids=[5, 6, 7, 8, 1]),
        answer(token_ids=[5], finish_reason="length"),
        answer(finish_reason="abort"),
        answer(finish_reason=None),
        b'{"choices": []}',
        b'{"choices": [1], "usage": {}}',
        b"[]",
        b"\xff",
    ],
)
def test_answers_to_ask_for_again(content):
    with pytest.raises(UnusableError):
        read_answer(ASK, content, 10, "s")


@given(st.integers(0, len(answer(usage={"completion_tokens": 3})) - 1))
def test_no_cut_answer_passes(length):
    with pytest.raises(UnusableError):
        read_answer(ASK, answer(usage={"completion_tokens": 3})[:length], 10, "s")


def test_the_body_leaves_nothing_to_the_servers_defaults():
    body = ASK.body(SamplingSettings(temperature=0.6, top_p=0.95, top_k=20))
    assert (body["prompt"], body["max_tokens"], body["top_k"], body["stop_token_ids"]) == ([3, 4], 4, 20, [1, 2])
    assert {"min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed"} <= set(body)


def test_seeds_follow_seed_and_key():
    seeds = {trace_seed(seed, f"p{i}#0") for seed in range(3) for i in range(300)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert trace_seed(1, "a") == trace_seed(1, "a")


def test_what_a_server_says_of_an_error():
    assert error_text(b'{"error": {"message": "too\\n long"}}') == "too long"
    assert error_text(b'{"message": "busy"}') == "busy"
    assert error_text(b"<html>502</html>") == "<html>502</html>"
    assert error_text(b"") == "no reason given"


def test_the_least_busy_server_that_does_not_rest_is_next():
    now = [0.0]
    balancer = Balancer(["a", "b"], clock=lambda: now[0])
    a, b = balancer.servers
    a.under_way, b.under_way = 3, 1
    assert balancer.take() == (b, 0.0)
    assert balancer.take(last=b) == (a, 0.0)
    b.rest(0.0, 0.0)
    assert balancer.take() == (a, 0.0)
    a.rest(0.0, 0.0, seconds=50)
    server, wait = balancer.take(last=b)
    assert server is b
    assert 0 < wait <= servers.FIRST_PAUSE
    now[0] = 60.0
    assert balancer.take() == (b, 0.0)


def test_requests_that_fail_together_count_once():
    (server,) = Balancer(["a"]).servers
    for _ in range(64):
        server.rest(asked_at=1.0, now=2.0)
    assert server.rests_until - 2.0 <= servers.FIRST_PAUSE
    server.rest(asked_at=3.0, now=4.0)
    assert server.rests_until - 4.0 >= servers.FIRST_PAUSE / 2
    server.answered()
    server.rest(asked_at=5.0, now=6.0)
    assert server.rests_until - 6.0 <= servers.FIRST_PAUSE


def test_pauses_double_up_to_a_minute():
    assert 0.25 <= pause(1) <= 0.5
    assert 2 <= pause(4) <= 4
    assert pause(1000) <= servers.LONGEST_PAUSE


def test_retry_after_is_a_number_or_a_date():
    assert retry_after("3") == 3.0
    assert retry_after("-1") == 0.0
    assert 50 < retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    assert retry_after(None) is retry_after("soon") is None


def test_failures_come_back_and_a_torn_line_does_not(tmp_path):
    store = tmp_path / "s.jsonl"
    assert read_failures(store) == []
    one, two = FailedProblem("a#0", "1+1?", "why"), FailedProblem("b#0", "ü", "wegen")
    append_failures(store, [one])
    with failures_path(store).open("ab") as file:
        file.write(b'{"id": "x')
    assert read_failures(store) == [one]
    append_failures(store, [two])
    assert read_failures(store) == [one, two]
    forget_failures(store)
    assert read_failures(store) == []
    failures_path(store).write_text("notes\n")
    with pytest.raises(RacError, match="no list of failed problems"):
        read_failures(store)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", ["1GB", "40KB"])
def test_a_model_on_disk_is_known_as_if_loaded(tmp_path, tied, shards):
    model = tiny_model(tie_word_embeddings=tied).to(torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[1, 2])
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "40KB")
    loaded = ModelIdentity.of_model(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    found = ModelIdentity.of_files(str(tmp_path))
    assert (found.name, found.fingerprint) == (loaded.name, loaded.fingerprint)
    assert (found.vocab_size, found.context) == (loaded.vocab_size, loaded.context)
    assert found.eos(tiny_tokenizer()) == (1, 2)
    assert SamplingSettings().resolved(found.generation_config) == SamplingSettings().resolved(loaded.generation_config)


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(RacError, match="cannot be read"):
        ModelIdentity.of_files(str(tmp_path / "none"))


def test_folders_of_two_models_are_told_apart(tmp_path):
    one, copy, other = tmp_path / "one", tmp_path / "copy", tmp_path / "other"
    save_tiny(one)
    save_tiny(copy)
    save_tiny(other, intermediate_size=96)
    check_card({"root": str(copy)}, str(one), 512, 10, "s")
    check_card({"root": "/models/elsewhere", "max_model_len": 512}, str(one), 512, 1000, "s")
    with pytest.raises(RacError, match="differs from that of"):
        check_card({"root": str(other)}, str(one), 512, 10, "s")


def test_probes_let_the_same_weights_in_bfloat16_pass():
    model = tiny_model()
    prompt = list(range(3, 20))

    def greedy(other):
        ids = torch.tensor([prompt])
        for _ in range(12):
            ids = torch.cat([ids, other(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        return Probe(prompt_ids=tuple(prompt), completion_ids=tuple(ids[0, len(prompt) :].tolist()))

    check_probes(model, [greedy(tiny_model().to(torch.bfloat16))], "s")
    with pytest.raises(RacError, match="s holds another model"):
        check_probes(model, [greedy(tiny_model(seed=1))], "s")
