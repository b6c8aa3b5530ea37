import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.problems import answer_checker
from rac_modifier.problems.answers import (
    completion_text,
    equal_answers,
    extract_answer,
    thinking_length,
)
from tests.tiny import byte_tokenizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed { 7 }", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{5} and then cut at \boxed{1", "5"),
        (r"x} { \boxed{5}", "5"),
        (r"\boxed{}", None),
        (r"\boxed{5}. I have put it within \boxed{ }.", "5"),
        (r"\boxed{3} no</think> so \boxed{4}", "4"),
        (r"\boxed{3} is only a thought</think> it is 4", None),
        (r"</think>\boxed{3}</think> and on", "3"),
        ("no box, 5", None),
        (r"\fbox{5}", None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


def scan_from_the_right(tokens):
    for start in reversed([i for i, token in enumerate(tokens) if token == "\\boxed{"]):
        depth = 1
        for end in range(start + 1, len(tokens)):
            depth += {"\\boxed{": 1, "{": 1, "}": -1}.get(tokens[end], 0)
            if depth == 0:
                content = "".join(tokens[start + 1 : end]).strip()
                if content:
                    return content
                break
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\}", "a", "\n"]), max_size=30))
def test_against_a_plain_scan_from_the_right(tokens):
    assert extract_answer("".join(tokens)) == scan_from_the_right(tokens)


def test_many_open_boxes_take_linear_time():
    """Quadratic time would be hours."""
    assert extract_answer("\\boxed{" * 200_000) is None


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("01234", "+1234", True),
        ("-0", "0", True),
        ("-5", "5", False),
        ("1235", "1234", False),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 5000, "9" * 4999 + "8", False),
        ("yes", "yes", True),
        ("Yes", "yes", True),
        ("star", "rats", False),
        ("no", "on", False),
        ("", "0", False),
        ("$7$", r"\boxed{7}", True),
        ("25.", "25", True),
        ("25。", "25", True),
        ("90°", "90", True),
        ("€5", "5", True),
        ("12 £.", "12", True),
        ("€5", "6", False),
        (r"12\,345", "12345", True),
        ("12~345", "12345", True),
        (r"\text{June 20}", "June 20", True),
        (r"\textbf{North}", "north", True),
        (r"\text{silent}", "listen", False),
    ],
)
def test_text_and_integers_need_no_math_verify(monkeypatch, answer, reference, expected):
    monkeypatch.setattr(answer_checker, "check_answer", None)
    assert equal_answers(answer, reference) is expected


def test_everything_else_is_compared_as_mathematics_without_its_wrapping(monkeypatch):
    asked = []
    monkeypatch.setattr(
        answer_checker, "check_answer", lambda *question: asked.append(question) or True
    )
    assert equal_answers("$0.5$", r"\boxed{\frac{1}{2}}")
    assert asked == [("mathematics", "0.5", r"\frac{1}{2}")]


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("xy", "yx"),
        ("inf", "infinity"),
        ("10 cm", "10"),
        (r"1\,234\text{ km}", "1234"),
        ("5\\%.", "5"),
        ("18 dollars", "18"),
        ("18", "18 dollars"),
        ("-1 1/2 pies", "-1.5"),
        ("5/4", "1 1/4"),
        ("1.5e-5", "0.000015"),
        (r"6.02 \times 10^{23}", "6.02e23"),
        (r"10^{-7}", "0.0000001"),
        ("0.000033", r"\frac{1}{30000}"),
        ("0.00005", "0.005\\%"),
    ],
)
def test_products_names_units_and_mixed_numbers_are_mathematics(answer, reference):
    assert equal_answers(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("18 dollars", "18 euros"), ("1 1/2", "1"), ("2e-7", "1e-7"), ("0.0000002", "0.0000001")],
)
def test_other_units_and_numbers_are_wrong(answer, reference):
    assert not equal_answers(answer, reference)


@settings(max_examples=50)
@given(st.text("ab<>/ é", max_size=12), st.booleans(), st.text("ab<>/", max_size=12), st.booleans())
def test_thinking_ends_with_its_tag(before, closed, after, one_token):
    """The tag is one token or several."""
    tokenizer = byte_tokenizer(thinking_tags=one_token)
    text = before + ("</think>" if closed else "")
    ids = tokenizer.encode(text + after, add_special_tokens=False)
    prefix = tokenizer.encode(text, add_special_tokens=False)
    closes = "</think>" in text + after
    assert thinking_length(tokenizer, [7], ids) == (len(prefix) if closes else len(ids))
    assert completion_text(tokenizer, ids) == text + after
    for prompt in ("<think></think>", "1?</think>\n\n"):
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        assert thinking_length(tokenizer, prompt_ids, ids) == 0


def test_the_tag_stays_in_the_text_where_it_is_a_special_token():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["</think>"]})
    ids = tokenizer.encode("no</think>yes<|end|>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "noyes"
    assert completion_text(tokenizer, ids) == "no</think>yes"
    assert completion_text(tokenizer, ids[3:]) == "yes"
