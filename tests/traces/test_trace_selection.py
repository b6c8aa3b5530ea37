"""Which traces are kept, why the others are not, and who says that an answer is right."""

from itertools import islice

import pytest

from rac_modifier.errors import RacError
from rac_modifier.problems.source import load_problems
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.grading import Judge
from rac_modifier.traces.selection import Selection, select
from rac_modifier.traces.store import StoreHeader, Trace
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


def trace(tokenizer, problem, sample=0, text="5</think>\\boxed{5}", answer="5", finish="stop"):
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Trace(f"{problem}#{sample}", problem, (4,), ids, finish, 0, "2+3?", answer)


def run(traces, judge=None, **settings):
    selection = Selection(SelectSettings(**settings))
    return [t.id for t in select(traces, selection, judge)], selection


def test_by_default_everything_is_kept_and_nothing_is_judged(tokenizer):
    kept, selection = run([trace(tokenizer, "a", answer=None), trace(tokenizer, "b")])
    assert kept == ["a#0", "b#0"]
    assert selection.describe() == "kept 2 of 2"


def test_each_reason_is_counted_once(tokenizer):
    traces = [
        trace(tokenizer, "a"),
        trace(tokenizer, "b", text="6</think>\\boxed{6}"),
        trace(tokenizer, "c", text="6</think>\\boxed{6}", finish="length"),  # wrong too: the cheaper reason counts
        trace(tokenizer, "d", text="</think>\\boxed{5}"),
        trace(tokenizer, "e", text="5 " * 40 + "</think>\\boxed{5}"),
    ]
    kept, selection = run(
        traces, Judge(tokenizer, header()), answers="correct", finished=True, min_tokens=11, max_tokens=60
    )
    assert kept == ["a#0"]
    assert selection.as_dict() == {
        "kept": 1, "of": 5, "dropped": {"wrong": 1, "unfinished": 1, "too short": 1, "too long": 1},
    }  # fmt: skip
    assert selection.describe() == "kept 1 of 5: 1 wrong, 1 unfinished, 1 too short, 1 too long"
    assert run(traces, Judge(tokenizer, header()), answers="wrong")[0] == ["b#0", "c#0"]


def test_an_answer_that_is_missing_is_wrong_and_mathematics_is_compared(tokenizer):
    traces = [
        trace(tokenizer, "a", text="\\boxed{5}, I think", answer="5", finish="length"),  # no </think>: searched whole
        trace(tokenizer, "b", text="it is 5</think>5"),
        trace(tokenizer, "c", text="</think>\\boxed{0.5}", answer=r"\frac{1}{2}"),
    ]
    assert run(traces, Judge(tokenizer, header()), answers="correct")[0] == ["a#0", "c#0"]


def test_pass_rate_chooses_whole_problems(tokenizer):
    right, wrong = "</think>\\boxed{5}", "</think>\\boxed{6}"
    texts = {"easy": [right] * 4, "even": [right, wrong] * 2, "hard": [wrong] * 4}
    traces = [trace(tokenizer, name, i, text) for name, of in texts.items() for i, text in enumerate(of)]
    judge = Judge(tokenizer, header())
    kept, selection = run(traces, judge, pass_rate=(0.25, 0.75))
    assert kept == [f"even#{i}" for i in range(4)]
    assert selection.dropped == {"too easy": 4, "too hard": 4}
    assert run(traces, judge, pass_rate=(0.25, 1), answers="correct", per_problem=1)[0] == ["easy#0", "even#0"]


def test_dedupe_and_the_cap_of_a_problem(tokenizer):
    traces = [trace(tokenizer, "a", i, text) for i, text in enumerate(["x", "y", "x", "z"])] + [
        trace(tokenizer, "b", 0, "x")
    ]
    assert run(traces, dedupe=True)[0] == ["a#0", "a#1", "a#3"]
    kept, selection = run(traces, per_problem=2)
    assert kept == ["a#0", "a#1", "b#0"]
    assert selection.dropped == {"beyond per_problem": 2}


def test_a_verdict_is_asked_for_once(tokenizer, monkeypatch):
    judge = Judge(tokenizer, header())
    traces = [trace(tokenizer, "a"), trace(tokenizer, "b", text="no")]
    first = list(judge(traces))
    monkeypatch.setattr(judge, "_check", None)
    assert list(judge(traces)) == first == [(traces[0], True), (traces[1], False)]


def test_reasoning_gym_judges_its_own_tasks(tokenizer):
    """Also beyond its first chunk of problems, and by the seed of the store."""
    source = ProblemSource(source="reasoning-gym:spell_backward")
    problems = list(islice(load_problems(source, seed=5), 502))
    traces = []
    for problem in (problems[0], problems[501]):
        traces.append(trace(tokenizer, problem.id, 0, f"</think>\\boxed{{{problem.answer}}}", "not looked at"))
        traces.append(trace(tokenizer, problem.id, 1, "</think>\\boxed{nonsense}", problem.answer))
    judged = Judge(tokenizer, header("reasoning-gym:spell_backward", seed=5))(traces)
    assert [right for _, right in judged] == [True, False, True, False]


def test_without_a_reference_the_error_says_what_to_set(tokenizer):
    with pytest.raises(RacError, match=r"no reference answer.*answer_column"):
        run([trace(tokenizer, "a", answer=None)], Judge(tokenizer, header()), answers="correct")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "leave no length between them"),
        ({"pass_rate": (0.8, 0.2)}, "the lowest and the highest share"),
        ({"pass_rate": (0, 1.5)}, "the lowest and the highest share"),
    ],
)
def test_settings_that_contradict_themselves(settings, words):
    with pytest.raises(ValueError, match=words):
        SelectSettings(**settings)


def test_settings_that_the_sampling_cannot_meet():
    with pytest.raises(RacError, match=r"min_tokens=100 can never be met with sampling\.max_new_tokens=99"):
        SelectSettings(min_tokens=100).check_against(99, 1)
    with pytest.raises(RacError, match="samples_per_problem to 2 or more"):
        SelectSettings(pass_rate=(0, 0.5)).check_against(99, 1)
