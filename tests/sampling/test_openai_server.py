"""The engine on servers: how many prompts are under way, which server completes which, and how it
ends."""

import threading
from concurrent.futures import CancelledError

import pytest

from rac_modifier.errors import RacError
from rac_modifier.sampling.completions_api import trace_seed
from rac_modifier.sampling.engine import Failure, Prompt
from rac_modifier.sampling.generate import generate
from rac_modifier.settings.sampling import SamplingSettings
from tests.sampling.fake_server import NAME, FakeServer, rule
from tests.tiny import tiny_model


def prompts(count, start=0):
    return [Prompt(f"p{i}#0", (2, 40 + i % 50)) for i in range(start, start + count)]


def outcomes(engine, asked):
    engine.connect()
    batches = engine.iter_completions([[prompt] for prompt in asked])
    return {prompt.key: outcome for batch in batches for prompt, outcome in batch}


def expected(prompt):
    body = {"seed": trace_seed(0, prompt.key), "prompt": list(prompt.ids), "max_tokens": 20}
    return tuple(rule(body))


def ids_of(answers):
    return {key: answer.ids for key, answer in answers.items()}


def test_every_prompt_is_completed_once_with_all_places_taken(make, server):
    together = threading.Barrier(4)
    server.delay = lambda body: together.wait() * 0
    taken = []

    def batches():
        for prompt in prompts(40):
            assert threading.current_thread() is threading.main_thread()
            taken.append(prompt.key)
            yield [prompt]

    engine, answers = make(), {}
    engine.connect()
    for batch in engine.iter_completions(batches()):
        assert len(taken) <= len(answers) + 4, "no more than there is room for"
        answers |= dict(batch)
    assert {p.key: answer.ids for p, answer in answers.items()} == {
        p.key: expected(p) for p in prompts(40)
    }
    assert len(server.bodies) == 40
    assert server.most_at_once == 4


def test_an_error_ends_it_after_what_was_finished(make, server):
    bad = trace_seed(0, "p3#0")
    server.fault = lambda number, body: "401" if body["seed"] == bad else None
    engine = make(concurrency=1)
    engine.connect()
    answers = engine.iter_completions([[p] for p in prompts(5)])
    assert [prompt.key for _ in range(3) for prompt, _ in next(answers)] == ["p0#0", "p1#0", "p2#0"]
    with pytest.raises(RacError, match="api_key_env"):
        next(answers)
    assert len(server.bodies) == 4


def test_failures_are_outcomes(make, server, monkeypatch):
    monkeypatch.setattr("rac_modifier.sampling.server_client.TRIES", 2)
    refused, broken = trace_seed(0, "p1#0"), trace_seed(0, "p2#0")
    server.fault = lambda number, body: {refused: "400", broken: "500"}.get(body["seed"])
    answers = outcomes(make(), prompts(4))
    assert "told to answer 400" in answers["p1#0"].reason
    assert "tried" not in answers["p1#0"].reason
    assert answers["p2#0"].reason.endswith("answers 500: told to answer 500 (tried 2 times)")
    assert answers["p0#0"].ids == expected(prompts(1)[0])
    assert len(server.bodies) == 5


@pytest.mark.parametrize(
    ("length", "limit", "reason"),
    [
        (512, 512, "the prompt of 512 tokens fills the model's context of 512"),
        (300, 310, "a prompt of 300 and a completion of up to 20 tokens do not fit the servers'"),
    ],
)
def test_prompts_that_do_not_fit_are_not_sent(make, server, length, limit, reason):
    server.cards[0]["max_model_len"] = limit
    (failure,) = outcomes(make(), [Prompt("long#0", (5,) * length)]).values()
    assert isinstance(failure, Failure)
    assert failure.reason.startswith(reason)
    assert server.bodies == []


@pytest.mark.parametrize("fault", [None, "503"])
def test_two_servers_share_the_work_and_one_may_fail(make, server, fault):
    """A server that fails costs few tries and no problem."""
    other = FakeServer()
    other.fault = lambda number, body: fault
    try:
        answers = outcomes(make(urls=(server.url, other.url)), prompts(40))
    finally:
        other.close()
    assert ids_of(answers) == {p.key: expected(p) for p in prompts(40)}
    assert min(len(server.bodies), len(other.bodies)) >= 1


def test_closing_drops_what_is_under_way(make, server):
    server.fault = lambda number, body: "hang"
    engine = make(timeout=600)
    engine.connect()
    ended = []

    def wait_for_them():
        with pytest.raises(CancelledError):
            list(engine.iter_completions([prompts(3)]))
        ended.append("cancelled")

    thread = threading.Thread(target=wait_for_them)
    thread.start()
    for _ in range(3):
        server.arrived.acquire()
    engine.close()
    engine.close()
    thread.join()
    assert ended == ["cancelled"]
    assert not engine._thread.is_alive()


def test_the_record_holds_greedy_tokens_that_are_compared_with_the_model(make, server, tokenizer):
    model = tiny_model()

    def greedy(body):
        settings = SamplingSettings(temperature=0, max_new_tokens=body["max_tokens"])
        return list(generate(model, tokenizer, [body["prompt"]], settings, [""])[0].ids)

    server.answer = greedy
    record = make(verify_model=True, weights=model).connect()
    assert (record.kind, record.served_model, record.root) == ("openai", NAME, "tiny")
    assert len(record.probes) == 4
    for probe in record.probes:
        body = {"prompt": list(probe.prompt_ids), "max_tokens": 24}
        assert list(probe.completion_ids) == greedy(body)
    assert make().connect().probes == ()
    with pytest.raises(RacError, match=r"holds another model than .*verify_model: false"):
        make(verify_model=True, weights=tiny_model(seed=1)).connect()
