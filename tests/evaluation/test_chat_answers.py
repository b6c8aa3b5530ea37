"""Answers of chat servers: reasoning fields joined, tokens counted, and what is refused."""

import json

import pytest

from rac_modifier.errors import RacError
from rac_modifier.evaluation.chat import ChatAnswer, chat_body
from rac_modifier.sampling.completions_api import RefusedError, UnusableError
from rac_modifier.settings.sampling import SamplingSettings


def body(message=None, finish="stop", usage=None, **changes) -> bytes:
    choice = {"message": {"content": "4"} if message is None else message, "finish_reason": finish}
    usage = {"completion_tokens": 10} if usage is None else usage
    return json.dumps({"choices": [choice], "usage": usage, **changes}).encode()


def read(*args, **changes) -> ChatAnswer:
    return ChatAnswer.read(body(*args, **changes), 10, "http://a")


@pytest.mark.parametrize(
    ("message", "text", "thinking_tokens"),
    [
        ({"content": "4"}, "4", 10),
        ({"content": "ab</think>" + "c" * 10}, "ab</think>" + "c" * 10, 5),
        ({"reasoning_content": "ab", "content": "c" * 10}, "ab</think>" + "c" * 10, 5),
        ({"reasoning": "x", "reasoning_content": "x", "content": None}, "x", 10),
        ({"content": "\ud800"}, "?", 10),
    ],
)
def test_thinking_is_joined_to_the_answer_and_tokens_are_divided_by_characters(
    message, text, thinking_tokens
):
    only_thinking = "content" in message and "reasoning" in message
    assert read(message) == ChatAnswer(text, "stop", 10, thinking_tokens, only_thinking)


@pytest.mark.parametrize(
    ("details", "thinking_tokens"),
    [({"reasoning_tokens": 3}, 3), ({"reasoning_tokens": 99}, 8), (3, 8)],
)
def test_a_servers_count_of_thinking_tokens_is_taken_where_it_has_one(details, thinking_tokens):
    usage = {"completion_tokens": 10, "completion_tokens_details": details}
    found = read({"content": "</think>cc"}, usage=usage)
    assert found.thinking_tokens == thinking_tokens


def test_an_empty_answer_is_its_end_alone():
    assert read({"content": None}, usage={"completion_tokens": 0}) == ChatAnswer("", "stop", 1, 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"message": "text"}, UnusableError, "has no text in reasoning_content"),
        ({"message": {"content": ["4"]}}, UnusableError, "has no text in"),
        ({"finish": "tool_calls"}, UnusableError, "'tool_calls' is neither stop nor length"),
        ({"usage": {"completion_tokens": True}}, UnusableError, "no count of at most 10"),
        ({"usage": {"completion_tokens": 11}}, UnusableError, "'11' is no count of at most 10"),
        ({"choices": []}, UnusableError, r"no completion in the answer \(ValueError"),
        ({"finish": "length", "usage": {"completion_tokens": 7}}, RefusedError, "7 of 10 tokens"),
        ({"message": {"content": None}}, RefusedError, "10 tokens without a text"),
        ({"usage": {}}, RacError, "http://a counts no tokens .*name the model folder"),
    ],
)
def test_a_field_that_is_missing_or_wrong_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        read(**changes)


def test_an_error_with_status_200_is_shown():
    content = json.dumps({"error": {"message": "over quota", "code": 429}}).encode()
    with pytest.raises(UnusableError, match=r"no completion in the answer \(over quota\)"):
        ChatAnswer.read(content, 10, "http://a")


def test_a_count_of_a_truncated_answer_may_miss_the_cap_by_two():
    found = read(finish="length", usage={"completion_tokens": 8})
    assert (found.finish_reason, found.tokens) == ("length", 8)


def test_a_request_has_the_settings_of_the_completions_protocol_and_no_token_ids():
    sampling = SamplingSettings(
        temperature=0.6,
        top_p=0.9,
        top_k=0,
        max_new_tokens=5,
        system_prompt="Be brief.",
        thinking=False,
    )
    sent = chat_body("1+1?", "q#0", sampling)
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
    ]
    assert (sent["max_tokens"], sent["temperature"], sent["top_k"]) == (5, 0.6, -1)
    assert sent["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    assert sent["seed"] != chat_body("1+1?", "q#1", sampling)["seed"]
