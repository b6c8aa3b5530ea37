"""What is asked, and which answers count."""

import json

import pytest

from rac_modifier.errors import RacError
from rac_modifier.sampling.completions_api import (
    Request,
    UnusableError,
    error_text,
    read_answer,
    trace_seed,
)
from rac_modifier.settings.sampling import SamplingSettings

REQUEST = Request((3, 4), 4, 0, (1, 2))


def answer(*, usage=None, **choice):
    made = {"token_ids": [5, 6, 1], "prompt_token_ids": [3, 4], "finish_reason": "stop", **choice}
    return json.dumps({"choices": [made], "usage": usage}).encode()


@pytest.mark.parametrize(
    ("content", "ids", "reason"),
    [
        (answer(), (5, 6, 1), "stop"),
        (answer(prompt_token_ids=None, usage={"completion_tokens": 3}), (5, 6, 1), "stop"),
        (answer(token_ids=[5, 2]), (5, 2), "stop"),
        (answer(token_ids=[5, 6, 7, 8], finish_reason="length"), (5, 6, 7, 8), "length"),
        (answer(token_ids=[5, 6, 7, 2], finish_reason="length"), (5, 6, 7, 2), "stop"),
        (answer(token_ids=[5, 6, 7, 2]), (5, 6, 7, 2), "stop"),
    ],
)
def test_an_answer_is_taken_as_it_is(content, ids, reason):
    found = read_answer(REQUEST, content, 10, "s")
    assert (found.ids, found.finish_reason) == (ids, reason)


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
        read_answer(REQUEST, content, 10, "s")


@pytest.mark.parametrize(
    ("choice", "ids", "reason"),
    [
        ({"text": "ab"}, (97, 98, 1), "stop"),
        ({"text": ""}, (1,), "stop"),
        ({"text": "abcde", "finish_reason": "length"}, (97, 98, 99, 100, 101), "length"),
    ],
)
def test_text_without_ids_is_tokenized_where_that_is_enough(choice, ids, reason):
    """The EOS is not in the text, and a count of other tokens may be above the cap."""
    found = read_answer(
        REQUEST, answer(token_ids=None, **choice), 10, "s", lambda text: text.encode()
    )
    assert (found.ids, found.finish_reason) == (ids, reason)
    exact = read_answer(REQUEST, answer(text="other"), 10, "s", lambda text: text.encode())
    assert exact.ids == (5, 6, 1), "ids that are there count"


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"text": 5},
        {"text": "a", "finish_reason": "abort"},
        {"text": "", "finish_reason": "length"},
    ],
)
def test_text_to_ask_for_again(choice):
    with pytest.raises(UnusableError, match="finish_reason"):
        read_answer(REQUEST, answer(token_ids=None, **choice), 10, "s", lambda text: text.encode())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (answer(token_ids=None), "s returned text without token ids.*return_token_ids"),
        (
            answer(prompt_token_ids=[4]),
            r"s read another prompt than it was sent \(1 tokens, not 2\)",
        ),
        (answer(token_ids=[5, 6]), r"ended a completion on token 6, which is no EOS \(1, 2\)"),
        (
            answer(token_ids=[5, 2, 6, 1]),
            "continued a completion after an EOS; switch off `ignore_eos`",
        ),
    ],
)
def test_answers_that_another_try_does_not_mend(content, words):
    with pytest.raises(RacError, match=words):
        read_answer(REQUEST, content, 10, "s")


def test_the_request_leaves_nothing_to_the_servers_defaults():
    assert REQUEST.body("m", SamplingSettings(temperature=0.6, top_p=0.95, top_k=20)) == {
        "model": "m", "prompt": [3, 4], "max_tokens": 4, "temperature": 0.6, "top_p": 0.95, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "seed": 0, "stream": False, "n": 1,
        "top_k": 20, "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [1, 2], "return_token_ids": True,
    }  # fmt: skip
    assert REQUEST.body("m", SamplingSettings(temperature=0.6, top_p=0.95, top_k=0))["top_k"] == -1


def test_seeds_follow_seed_and_key():
    seeds = {trace_seed(seed, f"p{i}#0") for seed in range(3) for i in range(300)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert trace_seed(1, "a") == trace_seed(1, "a")
    assert (
        trace_seed(0, "addition:1,2#0") == 2074697376
    )  # stores that exist were sampled with these


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "too\\n long"}}', "too long"),
        (b'{"message": "too long"}', "too long"),
        (b'{"error": {"code": 7}}', "{'code': 7}"),
        (b"<html>502</html>", "<html>502</html>"),
        (b"", "no reason given"),
        (b"x" * 1000, "x" * 300),
        (b"[" * 100_000, "[" * 300),
    ],
)
def test_the_message_of_an_error(body, text):
    assert error_text(body) == text
