"""Whether the answer of a trace is right."""

from itertools import islice

import pytest

from rac_modifier.errors import RacError
from rac_modifier.problems.source import load_problems
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces import grading
from rac_modifier.traces.grading import Judge
from rac_modifier.traces.records import StoreHeader, Trace
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def header(source="arithmetic", seed=0):
    return StoreHeader(
        fingerprint="f",
        model="m",
        tokenizer="t",
        sampling=SamplingSettings(seed=seed),
        problems=ProblemSource(source=source),
    )


def trace(tokenizer, problem, text, answer="5", sample=0):
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Trace(f"{problem}#{sample}", problem, (4,), ids, "stop", 0, "2+3?", answer)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("5</think>\\boxed{5}<|end|>", "5", True),
        ("5</think>\\boxed{6}", "5", False),
        ("\\boxed{5}, I think", "5", True),  # no </think>: searched whole
        ("\\boxed{5}</think>it is 5", "5", False),
        ("</think>\\boxed{0.5}", r"\frac{1}{2}", True),
    ],
)
def test_the_answer_behind_the_thinking_counts(tokenizer, text, answer, right):
    assert Judge(tokenizer, header()).is_right(trace(tokenizer, "a", text, answer)) is right


def test_traces_come_back_in_their_order(tokenizer, monkeypatch):
    monkeypatch.setattr(grading, "_TOGETHER", 7)
    traces = [trace(tokenizer, f"p{i}", f"</think>\\boxed{{{i % 3}}}", "1") for i in range(40)]
    assert list(Judge(tokenizer, header())(iter(traces))) == [
        (one, i % 3 == 1) for i, one in enumerate(traces)
    ]


def test_a_verdict_is_found_once(tokenizer, monkeypatch):
    judge = Judge(tokenizer, header())
    traces = [trace(tokenizer, "a", "</think>\\boxed{5}"), trace(tokenizer, "b", "no")]
    first = list(judge(traces))
    monkeypatch.setattr(judge, "_check", None)
    assert list(judge(traces)) == first == [(traces[0], True), (traces[1], False)]


def test_reasoning_gym_judges_its_own_tasks(tokenizer):
    """Also beyond its first chunk of problems, and by the seed of the store."""
    source = ProblemSource(source="reasoning-gym:spell_backward")
    problems = list(islice(load_problems(source, seed=5), 502))
    traces = []
    for problem in (problems[0], problems[501]):
        traces.append(
            trace(tokenizer, problem.id, f"</think>\\boxed{{{problem.answer}}}", "not looked at")
        )
        traces.append(
            trace(tokenizer, problem.id, "</think>\\boxed{nonsense}", problem.answer, sample=1)
        )
    judged = Judge(tokenizer, header("reasoning-gym:spell_backward", seed=5))(traces)
    assert [right for _, right in judged] == [True, False, True, False]


def test_without_a_reference_the_error_says_what_to_set(tokenizer):
    with pytest.raises(RacError, match=r"trace 'a#0' has no reference answer.*answer_column"):
        Judge(tokenizer, header()).is_right(trace(tokenizer, "a", "</think>\\boxed{5}", None))
