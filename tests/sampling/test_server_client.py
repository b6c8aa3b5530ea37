"""One server: tries, faults, limits, keys."""

import asyncio
import json

import pytest

from rac_modifier.errors import RacError
from rac_modifier.sampling.completions_api import (
    RefusedError,
    Request,
    UnavailableError,
    UnusableError,
)
from rac_modifier.sampling.server_client import ServerClient, ask
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from tests.sampling.fake_server import NAME, rule

SAMPLING = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0)
REQUEST = Request((3, 4, 5), 20, 7, (1,))
EXPECTED = tuple(rule({"seed": 7, "prompt": [3, 4, 5], "max_tokens": 20}))


def run(url, use, **settings):
    """Return what `use(client)` gives or raises."""

    async def inside():
        client = ServerClient(url, EngineSettings(base_urls=(url,), **settings))
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(inside())


@pytest.fixture(autouse=True)
def three_tries(monkeypatch):
    monkeypatch.setattr("rac_modifier.sampling.server_client.TRIES", 3)


def complete(server, **settings):
    def use(client):
        def read(content, url):
            return REQUEST.read(content, 102, url)

        client.model = NAME
        return ask([client], "/completions", REQUEST.body(SAMPLING), 23, read)

    return run(server.url, use, **settings)


def models(url, **settings):
    return run(url, lambda client: client.list_models(), **settings)


def faults(server, *kinds):
    """These faults, one per request, then none."""
    server.fault = lambda number, body: kinds[number] if number < len(kinds) else None


@pytest.mark.parametrize(
    "kind", [None, "500", "429", "reset", "truncate", "garbage", "deep", "short", "miscount"]
)
def test_a_fault_is_mended_by_another_try(server, kind):
    faults(server, kind, kind)
    assert complete(server).ids == EXPECTED
    assert server.bodies == [{"model": NAME, **REQUEST.body(SAMPLING)}] * (3 if kind else 1)


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (["500"] * 3, "answers 500: told to answer 500"),
        (["hang"] * 3, r"no answer within timeout=0\.3 s; set a longer one"),
        (["drip"] * 3, r"no answer within timeout=0\.3 s; set a longer one"),
        (["large"] * 3, r"an answer of more than 1,0\d\d,\d{3} bytes"),
        (["short", "500", "garbage"], r"no completion in the answer \(JSONDecodeError"),
    ],
)
def test_tries_are_counted_whatever_the_faults(server, kinds, words):
    """A deadline is for the whole answer: a byte now and then does not extend it."""
    faults(server, *kinds)
    late = {"timeout": 0.3} if {"hang", "drip"} & {*kinds} else {}
    with pytest.raises(UnusableError, match=rf"^{server.url}.*{words}"):
        complete(server, **late)


@pytest.mark.parametrize(
    ("kind", "of_server"),
    [("503", True), ("429", True), ("reset", True), ("truncate", True),
     ("500", False), ("hang", False), ("garbage", False)],
)  # fmt: skip
def test_the_state_of_a_server_is_told_from_a_bad_prompt(server, kind, of_server):
    """A prompt may be the reason of a 500, and too long for the timeout."""
    faults(server, *[kind] * 3)
    with pytest.raises(UnusableError, match=r"\(tried 3 times\)") as caught:
        complete(server, timeout=0.3)
    assert isinstance(caught.value, UnavailableError) == of_server


@pytest.mark.parametrize(
    ("retry_after", "waited"),
    [("7", 7), ("3600", 60), ("Wed, 21 Oct 2026 07:28:00 GMT", 0), ("-1", 0), ("", 0), (None, 0)],
)
def test_retry_after_is_waited_for_up_to_a_minute(server, monkeypatch, retry_after, waited):
    pauses = []
    sleep = asyncio.sleep

    async def noted(seconds):
        pauses.append(seconds)
        await sleep(0)

    server.retry_after = retry_after
    faults(server, "503", "429")
    with monkeypatch.context() as patched:
        patched.setattr("rac_modifier.sampling.server_client.asyncio.sleep", noted)
        assert complete(server).ids == EXPECTED
    pauses = [seconds for seconds in pauses if seconds]
    assert pauses == [waited] * 2 if waited else len(pauses) == 2 and max(pauses) <= 1


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("400", RefusedError, "answers 400: told to answer 400"),
        ("401", RacError, r"answers 401: .*engine\.api_key_env"),
        ("404", RacError, r"answers 404: .*traces\.engine"),
        ("307", RacError, r"answers 307: .*--server and --served-as"),
        ("no_ids", RacError, "return_token_ids"),
    ],
)
def test_what_does_not_change_is_asked_once(server, kind, error, words):
    faults(server, kind)
    with pytest.raises(error, match=words):
        complete(server)
    assert len(server.bodies) == 1


def test_the_list_of_models(server):
    assert f'"id": "{NAME}"'.encode() in models(server.url)
    for status, words in (
        (403, r"engine\.api_key_env"),
        (404, "it ends in /v1"),
        (503, "wait until"),
    ):
        server.list_status = status
        with pytest.raises(RacError, match=rf"/v1/models answers {status} .*{words}"):
            models(server.url)
    server.close()
    with pytest.raises(RacError, match=rf"no server answers at {server.url} .*\(--server, or "):
        models(server.url)


def test_only_a_key_that_the_settings_name_is_sent_and_it_is_cut_from_errors(server, monkeypatch):
    key = {"api_key_env": "RAC_TEST_KEY"}
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    complete(server)
    models(server.url)
    assert not any("authorization" in headers for headers in server.headers)
    server.headers.clear()
    with pytest.raises(RacError, match="'RAC_TEST_KEY', which is not set"):
        complete(server, **key)
    monkeypatch.setenv("RAC_TEST_KEY", "sk-1234")
    server.cards = [{"id": "sk-1234"}]
    faults(server, None, *["echo"] * 3)
    with pytest.raises(UnusableError, match=r"answers 500: Bearer \*\*\* \(tried"):
        complete(server, **key)
    assert b"sk-1234" not in models(server.url, **key)
    assert [headers["authorization"] for headers in server.headers] == ["Bearer sk-1234"] * 4
    monkeypatch.setenv("RAC_TEST_KEY", "sk-1234\nX-Other: 1")
    with pytest.raises(RacError, match=r"RAC_TEST_KEY \(api_key_env\) holds a line break"):
        complete(server, **key)


def test_a_key_in_an_answer_is_cut_and_a_placeholder_is_not(server, monkeypatch):
    key = 'sk-"0123456789'  # JSON escapes the quotation mark
    server.chat = lambda body: {"choices": [{"message": {"content": f"Bearer {key}, EMPTY"}}]}
    for value, content in ((key, "Bearer ***, EMPTY"), ("EMPTY", f"Bearer {key}, EMPTY")):
        monkeypatch.setenv("RAC_TEST_KEY", value)
        reply = run(
            server.url, lambda c: c.post("/chat/completions", {}, 9), api_key_env="RAC_TEST_KEY"
        )
        assert json.loads(reply)["choices"][0]["message"]["content"] == content


def test_prompts_for_this_machine_never_reach_a_proxy(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert complete(server).ids == EXPECTED
    for host in ("192.0.2.1", "127.0.0.1.example.com"):
        with pytest.raises(RacError, match=r"Cannot connect to host 127\.0\.0\.1:1 "):
            models(f"http://{host}/v1")
