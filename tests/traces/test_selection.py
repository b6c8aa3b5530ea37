"""Which traces are kept and why others are not; repeating tails; what a run has used."""

from dataclasses import replace

import pytest

from rac_modifier.settings.traces import SelectSettings
from rac_modifier.traces.records import Trace
from rac_modifier.traces.selection import (
    Selection,
    fresh_traces,
    repeated_tokens,
    select,
    used_traces,
    without_repeats,
)
from rac_modifier.traces.store import TraceStore

WHOLE = list(range(1000, 1200))


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
    assert run(traces, wrong, pass_rate=(0.25, 0.75), answers="correct")[0] == ["even#1", "even#3"]


@pytest.mark.parametrize(
    ("ids", "repeated"),
    [
        ([], 0),
        ([7], 0),
        (WHOLE, 0),
        ([7] * 63, 0),  # too short to be called a loop
        ([7] * 64, 63),
        (WHOLE + [7] * 64, 63),
        (WHOLE + [1, 2, 3] * 21, 0),  # 63 tokens
        (WHOLE + [1, 2, 3] * 22, 63),
        (WHOLE + [1, 2, 3] * 22 + [1], 64),  # the last copy need not be whole
        (WHOLE + [1, 2, 3] * 22 + [9], 0),  # it left the loop
        (WHOLE + [*range(60)] * 2, 0),  # two copies alone
        (WHOLE + [*range(60)] * 3, 120),
        (WHOLE + [*range(60)] * 2 + [*range(59)], 0),
        ([*range(128)] * 3, 256),
        ([*range(129)] * 4, 0),  # longer than what is looked for
        ([1, 1, 2] * 40, 117),  # the stretch is three tokens, not the one that stands twice
    ],
)
def test_how_many_tokens_repeat(ids, repeated):
    assert repeated_tokens(ids) == repeated


def test_only_a_completion_that_was_cut_loses_its_end():
    trace = Trace("a#0", "a", (5, 6), tuple(WHOLE + [1, 2, 3] * 30), "length", 0, "?", None)
    shorter = without_repeats(trace)
    assert shorter == replace(trace, completion_ids=(*WHOLE, 1, 2, 3))
    assert without_repeats(shorter) is shorter
    assert (
        without_repeats(replace(trace, finish_reason="stop")).completion_ids == trace.completion_ids
    )


def parts(trace_store, folder, *counts):
    """The store as it was when it had so many traces, each in a file of its own."""
    lines = trace_store.read_bytes().splitlines(keepends=True)
    found = []
    for count in counts:
        path = folder / f"{count}.jsonl"
        path.write_bytes(b"".join(lines[: 1 + count]))
        found.append(TraceStore.read(path))
    return found


def test_the_first_traces_are_told_by_the_hash_of_what_the_store_was(trace_store, tmp_path):
    none, five, nine = parts(trace_store, tmp_path, 0, 5, 9)
    whole = TraceStore.read(trace_store)
    assert used_traces(whole, [five.sha256()]) == 5
    assert used_traces(whole, [nine.sha256(), five.sha256()]) == 9
    assert used_traces(whole, [whole.sha256()]) == len(whole)
    assert used_traces(whole, [none.sha256(), "another"]) == 0
    assert used_traces(five, [nine.sha256()]) == 0


def test_fresh_traces_are_those_after_them(trace_store):
    store = TraceStore.read(trace_store)
    traces = list(store)
    fresh = fresh_traces(store, 5, 100)
    assert fresh == traces[5 : 5 + len(fresh)]
    assert sum(t.tokens for t in fresh[:-1]) < 100 <= sum(t.tokens for t in fresh)
    assert fresh_traces(store, len(traces), 100) == []


def test_fresh_traces_end_where_they_begin_to_repeat(trace_store, tmp_path):
    header = TraceStore.read(trace_store).header
    loops = [
        Trace(f"{i}#0", f"{i}", (1,) * 4, (*range(i), *(5, 6) * 50), "length", 0, "?", None)
        for i in range(4)
    ]
    with TraceStore.open_append(tmp_path / "loops.jsonl", header) as store:
        store.append_many(loops)
    fresh = fresh_traces(TraceStore.read(tmp_path / "loops.jsonl"), 1, 15)
    assert [t.completion_ids for t in fresh] == [
        (0, 5, 6),
        (0, 1, 5, 6),
    ]  # 7 and 8 tokens with their prompts
