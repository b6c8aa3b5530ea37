"""One server: tries, faults, keys."""

import asyncio
import contextlib

import pytest

from rac_modifier.errors import RacError
from rac_modifier.sampling.completions_api import Request
from rac_modifier.sampling.server_client import GaveUpError, RefusedError, ServerClient
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from tests.sampling.fake_server import NAME, rule

SAMPLING = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0)
REQUEST = Request((3, 4, 5), 20, 7, (1,))
EXPECTED = tuple(rule({"seed": 7, "prompt": [3, 4, 5], "max_tokens": 20}))


def run(server, use, **settings):
    """What `use(client)` gives, or raises, and the client."""

    async def inside():
        client = ServerClient(server.url, EngineSettings(base_urls=(server.url,), **settings))
        try:
            return await use(client), client
        finally:
            await client.close()

    return asyncio.run(inside())


def complete(server, tries=3, **settings):
    async def use(client):
        return await client.complete(
            REQUEST, model=NAME, vocab_size=102, sampling=SAMPLING, tries=tries
        )

    return run(server, use, **settings)[0]


def faults(server, *kinds):
    """These faults, one per request, then none."""
    server.fault = lambda number, body: kinds[number] if number < len(kinds) else None


def test_the_completion_is_that_of_the_server(server):
    assert complete(server).ids == EXPECTED
    (body,) = server.bodies
    assert (body["model"], body["prompt"], body["max_tokens"], body["seed"]) == (
        NAME,
        [3, 4, 5],
        20,
        7,
    )
    assert (body["top_k"], body["repetition_penalty"], body["return_token_ids"]) == (-1, 1.0, True)


@pytest.mark.parametrize(
    "kind", ["500", "429", "503", "reset", "truncate", "garbage", "short", "miscount", "hang"]
)
def test_a_fault_is_mended_by_another_try(server, kind):
    faults(server, kind, kind)
    assert complete(server, timeout=0.3).ids == EXPECTED
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (["500"] * 3, "answers 500: told to answer 500"),
        (["reset"] * 3, "Error"),
        (["hang"] * 3, r"no answer within timeout=0\.3 s; set a longer one"),
        (["short"] * 3, "finish_reason 'length' after 1 of 20 tokens"),
        (["short", "500", "garbage"], r"no completion in the answer \(JSONDecodeError"),
        (["500", "short", "429"], "answers 429: busy"),
    ],
)
def test_tries_are_counted_whatever_the_faults(server, kinds, words):
    faults(server, *kinds)
    with pytest.raises(GaveUpError, match=rf"^{server.url}.*{words}"):
        complete(server, timeout=0.3)
    assert len(server.bodies) == 3


def test_a_single_try(server):
    faults(server, "500")
    with pytest.raises(GaveUpError):
        complete(server, tries=1)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("400", RefusedError, "answers 400: told to answer 400"),
        ("401", RacError, r"answers 401: .*engine\.api_key_env"),
        ("404", RacError, r"answers 404: .*engine\.model"),
        ("418", RacError, r"answers 418: .*base_urls"),
        ("no_ids", RacError, "return_token_ids"),
        ("other_prompt", RacError, "read another prompt"),
        ("no_eos", RacError, "which is no EOS"),
        ("past_eos", RacError, "ignore_eos"),
    ],
)
def test_what_does_not_change_is_asked_once(server, kind, error, words):
    faults(server, kind)
    with pytest.raises(error, match=words):
        complete(server)
    assert len(server.bodies) == 1


def test_a_server_fails_until_its_next_success(server):
    faults(server, "500", "400")
    states = []

    async def use(client):
        for _ in range(3):
            with contextlib.suppress(GaveUpError, RefusedError):
                await client.complete(
                    REQUEST, model=NAME, vocab_size=102, sampling=SAMPLING, tries=1
                )
            states.append((client.failing, client.under_way))

    run(server, use)
    assert states == [(True, 0), (True, 0), (False, 0)]


def test_the_list_of_models(server):
    assert f'"id": "{NAME}"'.encode() in run(server, lambda client: client.list_models())[0]
    server.list_status = 403
    with pytest.raises(RacError, match=r"/v1/models answers 403 .*engine\.api_key_env"):
        run(server, lambda client: client.list_models())
    server.list_status = 404
    with pytest.raises(RacError, match=r"/v1/models answers 404 .*they end in /v1"):
        run(server, lambda client: client.list_models())
    server.close()
    with pytest.raises(
        RacError, match=rf"no server answers at {server.url} \(.*start it, or correct base_urls"
    ):
        run(server, lambda client: client.list_models())


def test_only_a_key_that_the_settings_name_is_sent(server, monkeypatch):
    """openai would take keys and names from its own variables, and send them to any server."""
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "secret")
    complete(server)
    run(server, lambda client: client.list_models())
    assert len(server.headers) == 2
    assert not any("secret" in value for headers in server.headers for value in headers.values())
    assert not any("authorization" in headers for headers in server.headers)
    told = {
        name
        for headers in server.headers
        for name in headers
        if name.startswith(("x-stainless", "openai"))
    }
    assert told <= {
        "x-stainless-retry-count",
        "x-stainless-raw-response",
    }  # nothing about this machine
    server.headers.clear()
    with pytest.raises(RacError, match="'RAC_TEST_KEY', which is not set"):
        complete(server, api_key_env="RAC_TEST_KEY")
    monkeypatch.setenv("RAC_TEST_KEY", "k")
    complete(server, api_key_env="RAC_TEST_KEY")
    run(server, lambda client: client.list_models(), api_key_env="RAC_TEST_KEY")
    assert [headers["authorization"] for headers in server.headers] == ["Bearer k"] * 2
    assert not any("secret" in value for headers in server.headers for value in headers.values())
