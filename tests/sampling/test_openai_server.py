"""The engine on servers: how many prompts are under way, which server completes which, and how it ends."""

import threading
from concurrent.futures import CancelledError

import pytest
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.sampling import openai_server
from rac_modifier.sampling.completions_api import trace_seed
from rac_modifier.sampling.engine import Failure, Prompt
from rac_modifier.sampling.generate import warn_of_cap
from rac_modifier.sampling.openai_server import least_busy
from rac_modifier.sampling.server_client import ServerClient
from tests.sampling.conftest import SAMPLING
from tests.sampling.fake_server import FakeServer, rule


def prompts(count, start=0):
    return [Prompt(f"p{i}#0", (2, 40 + i % 50)) for i in range(start, start + count)]


def outcomes(engine, many):
    engine.connect()
    return {
        c.prompt.key: c.outcome
        for some in engine.iter_completions([[p] for p in many])
        for c in some
    }


def expected(prompt, seed=0):
    body = {"seed": trace_seed(seed, prompt.key), "prompt": list(prompt.ids), "max_tokens": 20}
    return tuple(rule(body))


def test_every_prompt_is_completed_once(make, server):
    server.delay = lambda body: 0.01 * (body["seed"] % 3)
    found = outcomes(make(), prompts(40))
    assert {key: one.ids for key, one in found.items()} == {p.key: expected(p) for p in prompts(40)}
    assert len(server.bodies) == 40
    assert 2 <= server.most_at_once <= 4


def test_prompts_are_taken_only_as_there_is_room(make, server):
    """At most `concurrency` unfinished ones, and not further ahead of the oldest than four times that."""
    first, rest = prompts(1)[0], prompts(100, start=1)
    blocked = trace_seed(0, first.key)
    server.fault = lambda number, body: "hang" if body["seed"] == blocked else None
    taken = []

    def batches():
        for prompt in [first, *rest]:
            taken.append(prompt.key)
            yield [prompt]

    engine = make(timeout=30)
    engine.connect()
    finished = engine.iter_completions(batches())
    assert taken == []  # nothing before the first completion is wanted
    seen = 0
    while seen < 15:
        seen += len(next(finished))
    assert len(taken) == 16
    threading.Timer(0.2, server.released.set).start()
    seen += sum(len(some) for some in finished)
    assert seen == len(taken) == 101


def test_what_is_yielded_may_depend_on_completions(make):
    """Prompts are taken in the caller's thread, after it has seen what was finished."""
    engine = make(concurrency=1)
    engine.connect()
    done = []

    def batches():
        while len(done) < 5:
            assert threading.current_thread() is threading.main_thread()
            yield prompts(1, start=len(done))

    for some in engine.iter_completions(batches()):
        done.extend(some)
    assert [completion.prompt.key for completion in done] == [f"p{i}#0" for i in range(5)]


def test_an_error_ends_it_after_what_was_finished(make, server):
    bad = trace_seed(0, "p3#0")
    server.fault = lambda number, body: "401" if body["seed"] == bad else None
    engine = make(concurrency=1)
    engine.connect()
    finished = engine.iter_completions([[p] for p in prompts(5)])
    done = [completion.prompt.key for _ in range(3) for completion in next(finished)]
    with pytest.raises(RacError, match="api_key_env"):
        next(finished)
    assert done == ["p0#0", "p1#0", "p2#0"]
    assert len(server.bodies) == 4


def test_failures_are_outcomes(make, server, monkeypatch):
    monkeypatch.setattr(openai_server, "TRIES", 2)
    refused, broken = trace_seed(0, "p1#0"), trace_seed(0, "p2#0")
    server.fault = lambda number, body: {refused: "400", broken: "500"}.get(body["seed"])
    found = outcomes(make(), prompts(4))
    assert "told to answer 400" in found["p1#0"].reason
    assert "tried" not in found["p1#0"].reason
    assert found["p2#0"].reason.endswith("answers 500: told to answer 500 (tried 2 times)")
    assert found["p0#0"].ids == expected(prompts(1)[0])
    assert len(server.bodies) == 5


@pytest.mark.parametrize(
    ("length", "limit", "reason"),
    [
        (512, 512, "the prompt of 512 tokens fills the model's context of 512"),
        (
            300,
            310,
            "a prompt of 300 and a completion of up to 20 tokens do not fit the servers' --max-model-len of 310",
        ),
    ],
)
def test_prompts_that_do_not_fit_are_not_sent(make, server, length, limit, reason):
    server.cards[0]["max_model_len"] = limit
    (found,) = outcomes(make(), [Prompt("long#0", (5,) * length)]).values()
    assert isinstance(found, Failure)
    assert found.reason.startswith(reason)
    assert server.bodies == []


def test_a_completion_ends_at_the_models_context_and_a_warning_says_so(make, server):
    warn_of_cap.cache_clear()
    lines = []
    sink = logger.add(lines.append, format="{message}")
    most = SAMPLING.max_new_tokens
    outcomes(make(), [Prompt("short#0", (5,) * (512 - most))])
    assert server.bodies[-1]["max_tokens"] == most
    assert not [line for line in lines if "context" in line]
    outcomes(make(), [Prompt("long#0", (5,) * 505)])
    logger.remove(sink)
    assert server.bodies[-1]["max_tokens"] == 7
    (warning,) = [line for line in lines if "context" in line]
    assert (
        f"max_new_tokens={most} and the prompt do not fit the model's context of 512 tokens"
        in warning
    )


def states(*pairs):
    made = []
    for number, (under_way, failing) in enumerate(pairs):
        client = ServerClient.__new__(ServerClient)
        client.url, client.under_way, client.failing = f"s{number}", under_way, failing
        made.append(client)
    return made


@pytest.mark.parametrize(
    ("servers", "tried", "chosen"),
    [
        ([(3, False), (1, False)], [], 1),
        ([(3, False), (1, False)], [1], 0),
        ([(3, False), (1, False)], [0, 1], None),
        ([(3, False), (1, True)], [], 0),  # one prompt at a time where it fails
        ([(3, False), (0, True)], [], 1),  # to notice when it works again
        ([(3, False), (1, True)], [0], 1),
        ([(3, True), (1, True)], [], 1),
    ],
)
def test_the_least_busy_server_is_next(servers, tried, chosen):
    made = states(*servers)
    found = least_busy(made, [made[i] for i in tried])
    assert found is (None if chosen is None else made[chosen])


def test_two_servers_share_the_work(make, server):
    other = FakeServer()
    try:
        server.delay = other.delay = lambda body: 0.01
        found = outcomes(make(urls=(server.url, other.url)), prompts(40))
    finally:
        other.close()
    assert {key: one.ids for key, one in found.items()} == {p.key: expected(p) for p in prompts(40)}
    assert min(len(server.bodies), len(other.bodies)) >= 10


@pytest.mark.parametrize("fault", ["reset", "503", "hang"])
def test_a_server_that_fails_costs_few_tries_and_no_problem(make, server, fault):
    """The first prompts at once, then one at a time, so that the other server does nearly everything."""
    other = FakeServer()
    other.fault = lambda number, body: fault
    server.delay = lambda body: 0.02
    try:
        found = outcomes(make(urls=(server.url, other.url), timeout=0.3), prompts(40))
        assert {key: one.ids for key, one in found.items()} == {
            p.key: expected(p) for p in prompts(40)
        }
        assert server.most_at_once >= 3
    finally:
        other.close()


def test_a_prompt_is_ready_while_whoever_takes_the_completions_is_busy(make, server):
    """For eight under way one more waits in the engine, and is sent when a completion ends."""
    engine = make(concurrency=8)
    engine.connect()
    finished = engine.iter_completions([[p] for p in prompts(30)])
    count = len(next(finished))
    for _ in range(9):  # the ninth comes although nothing was taken meanwhile
        assert server.arrived.acquire(timeout=300)
    assert count + sum(len(some) for some in finished) == 30
    assert server.most_at_once <= 8


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
        assert server.arrived.acquire(timeout=300)
    engine.close()
    engine.close()
    thread.join()
    assert ended == ["cancelled"]
    assert not engine._thread.is_alive()
