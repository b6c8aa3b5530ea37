"""Kinds of endings in four languages; ratios and intervals by brute force."""

import pytest

from rac_modifier.evaluation.stopping import (
    Ending,
    Inflation,
    Loop,
    TokenInflation,
    describe_loops,
    row_of_text,
    summary,
)
from rac_modifier.measure.intervals import ratio_interval
from rac_modifier.problems.source import Problem

# the answer of each text is 42; {loop} and {counter} are replaced by `text_of`
TEXTS = {
    "right": [
        "6 * 7</think>It is \\boxed{42}.",
        "六乘七</think>答案是 \\boxed{42}。",
        "\\boxed{41}? No.</think>\\boxed{42}",
    ],
    "wrong": [
        "6 mal 7 = 42</think>Die Antwort lautet 42.",  # accuracy needs a box
        "\\boxed{42}</think>C'est \\boxed{41}.",
        "\\boxed{42} or rather \\boxed{41}",
        "{loop}</think>\\boxed{41}",
    ],
    "reached": [
        "6 * 7, so the answer is 42. But wait, let me check",
        "So the final answer is \\boxed{42}.</think>The product of",
        "The answer is 42. {loop}",
        "\\boxed{41} is wrong, so \\boxed{42}. Let me verify that",
        "Antwort: \\boxed{42}\n{loop}",
    ],
    "looping": [
        "{loop}",
        "Is the answer 42? {loop}",
        "The answer is 41. {loop}",
        "Let me count. {counter}",
        "Wenn die Antwort 42 wäre. {german}",
        "Attendez, 42 est dans la question. {french}",
        "题目里有42。{chinese}",
    ],
    "going": [
        "If the answer is 42, then 42 / 6 is",
        "I wrote \\boxed{42}, but the carry is lost: \\boxed{41}. Now",
        "The answer is 42. Wait, the answer is 43. Let me",
    ],
}
LOOPS = {
    "{loop}": "Wait, let me check that again. " * 12,
    "{german}": "Moment, das stimmt so noch nicht ganz. " * 12,
    "{french}": "Attendez, il faut recommencer le calcul. " * 12,
    "{chinese}": "等等，我再检查一遍。" * 12,
    "{counter}": "".join(f"Try again: attempt {n}, the answer is {n}. " for n in range(34, 44)),
}
CASES = [(kind, text) for kind, texts in TEXTS.items() for text in texts]


def text_of(template: str) -> str:
    """Replace the names of loops; the last copy is cut."""
    for name, copies in LOOPS.items():
        template = template.replace(name, copies[:-3])
    return template


def ended(text: str, finish: str, ids: tuple[int, ...] = ()) -> Ending:
    problem = Problem("p", "Solve 6 * 7. Is it 42?", "42", None)
    lengths = {"tokens": 9, "thinking_tokens": 5}
    return row_of_text(problem, text, finish=finish, ids=ids, **lengths).ending


@pytest.mark.parametrize(("kind", "text"), CASES)
def test_the_kind_of_an_ending_is_read_from_text_alone(kind, text):
    ending = ended(text_of(text), "stop" if kind in ("right", "wrong") else "length")
    assert ending.kind == kind
    assert ending.closes == ("</think>" in text)
    assert ending.truncated == (kind not in ("right", "wrong"))
    loops = "{" + text.rpartition("{")[2] in LOOPS
    assert (ending.loop is not None) == (ending.truncated and loops)


def test_a_truncated_answer_that_accuracy_counts_as_right_had_reached_it():
    assert ended("\\boxed{42}. Now the answer is 41. So", "length").kind == "reached"


@pytest.mark.parametrize(
    ("text", "ids", "loop"),
    [
        ("so: " + LOOPS["{loop}"], (), Loop(2, 8, "words")),
        ("好:" + LOOPS["{chinese}"], (), Loop(2, 10, "words")),
        (LOOPS["{counter}"], (), Loop(0, 11, "words", counts=True)),
        ("", (5, 6, *(1, 2, 3) * 30, 1), Loop(2, 3, "tokens")),
        (
            "".join(f"Check {n}: {n % 2}. " for n in range(10, 50)),
            (),
            Loop(0, 10, "words", counts=True),
        ),
        ("".join(f"{n}: {n * n}, " for n in range(40)), (), None),  # squares: no constant step
    ],
)
def test_where_a_loop_begins_and_its_period(text, ids, loop):
    assert ended(text, "length", ids).loop == loop


def answers(*lengths: int, truncated: int | None = None) -> list[Ending]:
    """Finished endings of these lengths, and the one with the index `truncated`."""
    kinds = ["going" if i == truncated else "right" for i in range(len(lengths))]
    return [Ending(kind, n, n, True) for kind, n in zip(kinds, lengths, strict=True)]


def test_inflation_pairs_answers_and_counts_truncated_ones_at_the_cap():
    first = {"a": answers(10, 20), "b": answers(30, 40, truncated=1), "c": answers(5, 5)}
    second = {"a": answers(20, 20), "b": answers(60, 9), "c": answers(90, 15, truncated=0)}
    found = TokenInflation.of(first, second, cap=100)
    both, everything = found.both_finish, found.at_cap
    assert (both.answers, both.ratio) == (4, (40 + 60 + 15) / (30 + 30 + 5))
    assert (both.ci_low, both.ci_high) == ratio_interval([40, 60, 15], [30, 30, 5])
    assert (everything.answers, everything.ratio) == (6, (40 + 69 + 115) / (30 + 130 + 10))
    assert found.describe("dense", "2:4") == (
        f"tokens of 2:4 over dense: {both.describe()} on 4 answers that both finish; "
        f"{everything.describe()} on all 6 (truncated: the cap)"
    )


def test_without_a_common_finish_and_with_one_problem_there_is_no_interval():
    found = TokenInflation.of({"a": answers(4, truncated=0)}, {"a": answers(6)}, cap=8)
    assert found.both_finish is None
    assert found.at_cap == Inflation(1, 6 / 8, None, None)
    assert found.at_cap.describe() == "x0.75"


def test_summary_has_shares_and_means():
    endings = {"a": [Ending("right", 10, 4, True)], "b": [Ending("looping", 20, 20, False)]}
    assert summary(endings) == {
        "right": 0.5,
        "wrong": 0.0,
        "reached": 0.0,
        "looping": 0.5,
        "going": 0.0,
        "closes_thinking": 0.5,
        "thinking_tokens": 12,
        "answer_tokens": 3,
    }


def test_a_line_has_the_medians_of_the_loops_of_a_unit():
    def looping(*loop):
        return Ending("looping", 90, 90, False, Loop(*loop))

    found = {"a": [looping(30, 4, "tokens"), looping(9, 7, "words")], "b": answers(5)}
    found["c"] = [looping(40, 8, "tokens"), looping(10, 3, "tokens")]
    assert describe_loops("2:4", found) == [
        "2:4: 3 truncated answers repeat themselves, from 30 tokens on, every 4 tokens (medians).",
        "2:4: 1 truncated answers repeat themselves, from 9 words on, every 7 words (medians).",
    ]


def test_the_first_character_of_a_loop():
    pieces = ["so: ", "Wait, ", "", "again. ", "Wait, "]
    assert Loop(1, 2, "tokens").character(pieces) == 4
    assert Loop(4, 3, "words").character(pieces) == len("so: Wait, ")


@pytest.mark.parametrize(
    ("text", "finish", "kind"),
    [
        ("The answer is \\boxed{42}.", "stop", "finished"),
        ("The answer is 42. But wait, let me", "length", "going"),
        ("again and " * 64, "length", "looping"),
    ],
)
def test_an_answer_without_a_reference_is_not_graded(text, finish, kind):
    problem = Problem("p", "6 * 7?", None, None)
    row = row_of_text(problem, text, finish=finish, tokens=9, thinking_tokens=9)
    assert (row.correct, row.ending.kind) == (None, kind)
    shares = summary({"p": [row.ending]}, graded=False)
    assert [name for name, share in shares.items() if share == 1.0] == [kind]
    assert row.ending.truncated is (finish == "length")
