"""Statements and near misses; tests/evaluation/test_stopping.py has whole completions."""

import pytest

from rac_modifier.evaluation.statements import states_answer


@pytest.mark.parametrize(
    "text",
    [
        "So the answer is **42**.\n",
        "The final answer to this problem is therefore $42$, since",
        "Answer: \\(42\\)\n",
        "the answer is x = 42.\n",
        "The answer should be 42 apples.\n",
        "The answer is 42! Let me",
        "We get \\boxed{42} and",
        "so 6 * 7 = 42\nand",
        "The solution is $\\boxed{42}$, as",
        "The answer is 42. That is, 6 * 7 = 41\n",  # a stated answer counts, not an equation
        "write 4\n-> 42</think>",
        "the answer is 42</think>",
        "The answer is 41. No: the answer is 42. Check",
    ],
)
def test_the_answer_is_stated(text):
    assert states_answer(text, "42")


@pytest.mark.parametrize(
    "text",
    [
        "There are 42 of them, and",
        "the answer is 42",  # 42.5 or 421 may follow
        "the answer is 42.",
        "= 42",
        "the answer is 42.5. So",
        "the answer is 142. So",
        "the answer is not 42. So",
        "the answer cannot be 42. So",
        "The answer isn't 42. So",
        "Is it true that the answer is 42? I",
        "Let me check if the answer is 42. I",
        "Maybe the answer is 42. I",
        "the answer is 42 or 43. I",
        "the answer is \\boxed{42",
        "\\boxed{} then 42, and",
        "The answer is 42. Wait, the answer is 41. So",
        "= 42\n= 41\n",
    ],
)
def test_the_answer_is_not_stated(text):
    assert not states_answer(text, "42")


def test_an_answer_in_words_is_the_whole_clause():
    assert states_answer("So the answer is New York.\nBut", "New York")
    assert not states_answer("So the answer is New Delhi.\nBut", "New York")
    assert states_answer("The answer is (B). But", "B")
    assert not states_answer("The answer is (C). But", "B")


def test_a_verifier_compares():
    assert states_answer("The answer is up, down. So", "?", lambda answer, _: answer == "up")


def test_a_statement_of_the_question_is_none_of_the_model():
    question = "Ann says: the answer is 42. Solve x + 2 = 42\n"
    assert not states_answer("Ann says: the answer is 42. Solve x + 2 = 42\n", "42", None, question)
