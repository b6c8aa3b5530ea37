"""Statements and near misses; tests/evaluation/test_stopping.py has whole completions."""

import pytest

from rac_modifier.evaluation.stopping import states_answer


@pytest.mark.parametrize(
    "text",
    [
        "The final answer to this problem is therefore $42$, since",
        "the answer is x = 42.\n",
        "The answer should be 42 apples.\n",
        "The answer is 42! Let me",
        "The solution is $\\boxed{42}$, as",
        "The answer is 42. That is, 6 * 7 = 41\n",  # a stated answer counts, not an equation
        "write 4\n-> 42</think>",
        "#### 42\n\nWait",
        "The answer is $y = 42$. But",
        "the answer is €42. But",
        "the answer is 42</think>",
        "The answer is exactly 42 to the nearest integer. But",
        "The answer is `42`. But",
        "=> 42\nWait",
        "That is wrong, and the answer is 42. But",
        "It is true that the answer is 42. But",
    ],
)
def test_the_answer_is_stated(text):
    assert states_answer(text, "42")


@pytest.mark.parametrize(
    "text",
    [
        "the answer is 42",  # 42.5 or 421 may follow
        "the answer is 42.",
        "= 42",
        "the answer is 42.5. So",
        "the answer is 142. So",
        "the answer cannot be 42. So",
        "The answer isn't 42. So",
        "Let me check if the answer is 42. I",
        "Tom says that the answer is 42. I",
        "the answer is 42 or 43. I",
        "the answer is \\boxed{42",
        "The answer is 42. Wait, the answer is 41. So",
        "= 42\n= 41\n",
        "The answer might be 42. Let",
        "Assume the answer is 42. Then",
        "It is unlikely that the answer is 42. So",
        "It is false that the answer is 42. So",
        "I don't think the answer is 42. So",
        "x <= 42\n",
        "x != 42\n",
        "= 42 + 1\n",
        "the answer is 42 to 43. So",
    ],
)
def test_the_answer_is_not_stated(text):
    assert not states_answer(text, "42")


def test_an_answer_in_words_is_the_whole_clause():
    assert states_answer("So the answer is New York.\nBut", "New York")
    assert not states_answer("So the answer is New Delhi.\nBut", "New York")


@pytest.mark.parametrize(
    ("text", "answer", "states"),
    [
        ("The answer is (B). But", "B", True),
        ("The correct option is B. But", "B", True),
        ("The answer is option B: it is so. But", "B", True),
        ("The answer is (C). But", "B", False),
        ("The answer is A bit unclear. But", "A", False),
        ("The answer is $x^2 + 1$. But", "x^2+1", True),
        ("The answer is (2, 3). But", "(2,3)", True),
        ("The answer is 1,234. But", "1234", True),
        ("The answer is 3/4. But", "0.75", True),
        ("The answer is -5. But", "5", False),
    ],
)
def test_letters_formulas_and_numbers_are_read_as_written(text, answer, states):
    assert states_answer(text, answer) == states


def test_a_verifier_compares():
    assert states_answer("The answer is up, down. So", "?", lambda answer, _: answer == "up")


def test_a_statement_of_the_question_is_none_of_the_model():
    question = "Ann says: the answer is 42. Solve x + 2 = 42\n"
    assert not states_answer("Ann says: the answer is 42. Solve x + 2 = 42\n", "42", None, question)
