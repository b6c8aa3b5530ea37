import pytest
from hypothesis import given
from hypothesis import strategies as st

from rac_modifier.problems import answer_checker
from rac_modifier.problems.answers import equal_answers, extract_answer, is_correct


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"It is \boxed{12}.", "12"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed {7}", "7"),
        (r"\boxed{ 7 }", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x > 0 \right.}", r"\left\{ x > 0 \right."),
        (r"\boxed{5} and then cut at \boxed{1", "5"),
        (r"x} { \boxed{5}", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{3} no</think> so \boxed{4}", "4"),
        (r"\boxed{3} is only a thought</think> it is 4", None),
        (r"</think>\boxed{3}</think> and on", "3"),
        ("no box, 5", None),
        (r"\boxed{1", None),
        (r"\fbox{5}", None),
        ("", None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


balanced = st.recursive(
    st.text("abc 12\n", max_size=4),
    lambda inner: st.tuples(inner, inner).map(lambda t: f"{t[0]}{{{t[1]}}}"),
)


@given(st.lists(balanced, max_size=3), balanced, st.text("ab}{ ", max_size=6))
def test_last_balanced_box_is_found_behind_anything(before, content, behind):
    text = "".join(f"\\boxed{{{b}}} " for b in before) + f"\\boxed{{{content}}}{behind}"
    assert extract_answer(text) == content.strip()


def scan_from_the_right(tokens):
    for start in reversed([i for i, token in enumerate(tokens) if token == "\\boxed{"]):
        depth = 1
        for end in range(start + 1, len(tokens)):
            depth += {"\\boxed{": 1, "{": 1, "}": -1}.get(tokens[end], 0)
            if depth == 0:
                return "".join(tokens[start + 1 : end]).strip()
    return None


@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "\\{", "\\}", "a", "\n"]), max_size=30))
def test_against_a_plain_scan_from_the_right(tokens):
    assert extract_answer("".join(tokens)) == scan_from_the_right(tokens)


def test_many_open_boxes_take_linear_time():
    """Quadratic time would be hours."""
    assert extract_answer("\\boxed{" * 1_000_000) is None


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("1234", "1234", True),
        ("01234", "+1234", True),
        ("-0", "0", True),
        ("-5", "5", False),
        ("1235", "1234", False),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 5000, "9" * 4999 + "8", False),
        ("yes", "yes", True),
        ("", "0", False),
        ("$7$", "7", True),
        ("7", r"\boxed{7}", True),
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


def test_is_correct_looks_behind_the_thinking():
    assert is_correct(r"maybe \boxed{3}</think>\boxed{4}", "4")
    assert not is_correct(r"maybe \boxed{4}</think>\boxed{3}", "4")
    assert not is_correct("4", "4")
    assert not is_correct(r"\boxed{}", "4")


def test_a_verifier_replaces_the_comparison():
    assert is_correct(
        r"\boxed{b, a}", "a, b", lambda answer, reference: sorted(answer) == sorted(reference)
    )
    assert not is_correct("b, a", "a, b", lambda answer, reference: True)
