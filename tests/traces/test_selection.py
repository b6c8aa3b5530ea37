"""Which traces are kept, and why the others are not."""

from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.records import Trace
from rac_modifier.traces.selection import Selection, select


def trace(problem, sample=0, tokens=20, finish="stop"):
    """A trace of so many completion tokens, or with these."""
    ids = tuple(tokens) if not isinstance(tokens, int) else tuple(range(tokens))
    return Trace(f"{problem}#{sample}", problem, (4,), ids, finish, 0, "2+3?", "5")


def run(traces, wrong=(), **settings):
    """The ids of what is kept; answers are judged by whether the trace is among the wrong ones."""

    def judge(traces):
        return ((one, one.id not in wrong) for one in traces)

    selection = Selection(SelectSettings(**settings))
    return [one.id for one in select(traces, selection, judge)], selection


def test_by_default_everything_is_kept_and_nothing_is_judged():
    selection = Selection(SelectSettings())
    kept = list(select([trace("a"), trace("b", finish="length")], selection, None))
    assert [one.id for one in kept] == ["a#0", "b#0"]
    assert selection.describe() == "kept 2 of 2"
    assert selection.as_dict() == {"kept": 2, "of": 2, "dropped": {}}


def test_each_reason_is_counted_once():
    traces = [
        trace("a"),
        trace("b"),
        trace("c", finish="length"),  # wrong too: the cheaper reason counts
        trace("d", tokens=10),
        trace("e", tokens=61),
        trace("f", tokens=11),
        trace("g", tokens=60),
    ]
    wrong = {"b#0", "c#0", "d#0"}
    kept, selection = run(
        traces, wrong, answers="correct", finished=True, min_tokens=11, max_tokens=60
    )
    assert kept == ["a#0", "f#0", "g#0"]
    assert selection.as_dict() == {
        "kept": 3, "of": 7, "dropped": {"wrong": 1, "unfinished": 1, "too short": 1, "too long": 1},
    }  # fmt: skip
    assert selection.describe() == "kept 3 of 7: 1 wrong, 1 unfinished, 1 too short, 1 too long"
    kept, selection = run(traces, wrong, answers="wrong")
    assert kept == ["b#0", "c#0", "d#0"]
    assert selection.dropped == {"right": 4}


def test_pass_rate_chooses_whole_problems():
    traces = [trace(name, i) for name in ("easy", "even", "hard") for i in range(4)]
    wrong = {"even#0", "even#2", *(f"hard#{i}" for i in range(4))}
    kept, selection = run(traces, wrong, pass_rate=(0.25, 0.75))
    assert kept == [f"even#{i}" for i in range(4)]
    assert selection.dropped == {"too easy": 4, "too hard": 4}
    assert run(traces, wrong, pass_rate=(0.5, 0.5))[0] == kept
    assert run(traces, wrong, pass_rate=(0.25, 1), answers="correct", per_problem=1)[0] == [
        "easy#0",
        "even#1",
    ]


def test_dedupe_and_the_cap_of_a_problem():
    traces = [trace("a", i, tokens) for i, tokens in enumerate([(1,), (2,), (1,), (3,)])] + [
        trace("b", 0, (1,))
    ]
    kept, selection = run(traces, dedupe=True)
    assert kept == ["a#0", "a#1", "a#3"]
    assert selection.dropped == {"duplicates": 2}
    kept, selection = run(traces, per_problem=2)
    assert kept == ["a#0", "a#1", "b#0"]
    assert selection.dropped == {"beyond per_problem": 2}


def test_what_is_dropped_for_another_reason_is_no_original_of_a_duplicate():
    traces = [trace("a", 0, (1, 2), finish="length"), trace("a", 1, (1, 2))]
    assert run(traces, dedupe=True, finished=True)[0] == ["a#1"]
