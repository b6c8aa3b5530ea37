"""Answers as traces: the text of each token, and where two answers part."""

from __future__ import annotations

import pytest

from rac_modifier.evaluation.divergence import TokenDivergence
from rac_modifier.frontier.traces import ask, pieces_of, trace_of
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.generate import Generation
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import byte_tokenizer, tiny_model, tiny_tokenizer

PROBLEM = Problem("p", "1 + 1?", "2", None)


class DropsTheFirstSpace:
    """A decoder as that of sentencepiece: the space of a first token is dropped."""

    words = ["▁a", "▁b", "c"]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")


@pytest.mark.parametrize("text", ["", "abc", "naïve 漢字 🙂!", "🙂🙂"])
def test_the_pieces_are_the_text_token_by_token(text: str) -> None:
    """A character of several tokens belongs to the last one."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    expected = [p for c in text for p in [""] * (len(c.encode()) - 1) + [c]]
    assert pieces_of(tokenizer, ids) == expected


def test_half_a_character_at_the_end_and_a_decoder_that_drops_a_space() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a🙂", add_special_tokens=False)[:-1]
    assert "".join(pieces_of(tokenizer, ids)) == "a\ufffd"
    assert pieces_of(DropsTheFirstSpace(), [0, 1, 2, 1]) == ["a", " b", "c", " b"]


def test_where_two_answers_part() -> None:
    tokenizer = byte_tokenizer()
    end = tokenizer.eos_token_id
    dense = Generation((*tokenizer.encode("<think>ü1</think>2"), end), "stop")
    own = Generation(tuple(tokenizer.encode("<think>ü12")), "length")
    of_dense = trace_of(tokenizer, PROBLEM, dense, True)
    assert of_dense["text"] == "<think>ü1</think>2<|end|>"
    assert of_dense["pieces"] == [7, 0, 1, 1, 8, 1, 7]
    assert (of_dense["thinking"], of_dense["question"], of_dense["answer"]) == (5, "1 + 1?", "2")
    found = trace_of(
        tokenizer, PROBLEM, own, False, dense, TokenDivergence([0.123456] * 7, [True] * 7)
    )
    assert (found["same_tokens"], found["same_characters"]) == (4, len("<think>ü1"))
    assert found["kl"] == [0.1235] * 7
    assert (found["finish"], found["correct"], found["thinking"]) == ("length", False, 5)
    equal = trace_of(tokenizer, PROBLEM, dense, True, dense)
    assert equal["same_tokens"] == len(dense.ids)
    assert "kl" not in equal


def test_answers_say_whether_they_ended() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    sampling = SamplingSettings(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=40, seed=1)
    problems = [Problem(str(i), f"{i}?", None, None) for i in range(12)]
    answers = ask(model, tokenizer, problems, sampling)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    for answer in answers:
        assert (answer.ids[-1] == 1) == (answer.finish_reason == "stop")
        assert len(answer.ids) == 40 or answer.finish_reason == "stop"
