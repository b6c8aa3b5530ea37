"""Which traces are kept and why others are not; repeating tails; what a run has used."""

from dataclasses import replace
from itertools import islice

import pytest

from rac_modifier.errors import RacError
from rac_modifier.measure.repeats import loop_at_end
from rac_modifier.problems.source import load_problems
from rac_modifier.settings.calibration import SelectSettings
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.traces import selection
from rac_modifier.traces.records import Trace
from rac_modifier.traces.selection import Judge, Selection
from rac_modifier.traces.store import TraceStore
from tests.tiny import byte_tokenizer
from tests.traces.long_store import HEADER

WHOLE = list(range(1000, 1200))


def trace(problem, sample=0, tokens=20, finish="stop"):
    """A trace of so many completion tokens, or with these."""
    ids = tuple(tokens) if not isinstance(tokens, int) else tuple(range(tokens))
    return Trace(f"{problem}#{sample}", problem, (4,), ids, finish, 0, "2+3?", "5")


def run(traces, wrong=(), **settings):
    """The ids of what is kept; answers are judged by whether the trace is among the wrong ones."""

    def judge(traces):
        return ((trace, trace.id not in wrong) for trace in traces)

    chosen = Selection(SelectSettings(**settings))
    return [trace.id for trace in chosen.keep(traces, judge)], chosen


def test_by_default_everything_is_kept_and_nothing_is_judged():
    everything = Selection(SelectSettings())
    traces = [trace("a"), trace("b", finish="length")]
    assert list(everything.keep(traces, None)) == traces
    assert everything.describe() == "kept 2 of 2"
    assert everything.as_dict() == {"kept": 2, "of": 2, "dropped": {}}


def test_each_reason_is_counted_once():
    traces = [
        trace("a"),
        trace("b"),
        trace("c", finish="length"),  # wrong too: the cheaper reason counts
        trace("e", tokens=61),
        trace("g", tokens=60),
    ]
    kept, chosen = run(traces, {"b#0", "c#0"}, answers="correct", finished=True, max_tokens=60)
    assert kept == ["a#0", "g#0"]
    dropped = {"wrong": 1, "unfinished": 1, "too long": 1}
    assert chosen.as_dict() == {"kept": 2, "of": 5, "dropped": dropped}
    assert chosen.describe() == "kept 2 of 5: 1 wrong, 1 unfinished, 1 too long"


def test_only_a_truncated_completion_loses_its_end():
    trace = Trace("a#0", "a", (5, 6), tuple(WHOLE + [1, 2, 3] * 30), "length", 0, "?", None)
    shorter = trace.without_repeats()
    assert shorter == replace(trace, completion_ids=(*WHOLE, 1, 2, 3))
    assert shorter.without_repeats() is shorter
    ended = replace(trace, finish_reason="stop")
    assert ended.without_repeats() is ended


@pytest.mark.parametrize(("period", "kept"), [(3, 67), (20, 84), (40, 120), (128, 384)])
def test_as_many_copies_are_kept_as_show_that_it_repeats(period, kept):
    """Three copies, and 64 tokens behind the first."""
    ids = tuple(range(1000, 1010)) + tuple(range(period)) * 30
    trace = Trace("a#0", "a", (5, 6), ids, "length", 0, "?", None)
    cut = trace.with_copies()
    assert cut.completion_ids == ids[: 10 + kept]
    assert loop_at_end(cut.completion_ids) == loop_at_end(ids) == (10, period)
    for other in replace(trace, finish_reason="stop"), replace(trace, completion_ids=ids[:50]):
        assert other.with_copies() is other


def test_used_traces_are_told_by_the_hash_of_the_store_as_it_was(trace_store, tmp_path):
    lines = trace_store.read_bytes().splitlines(keepends=True)
    stores = {}
    for count in (0, 5, 9):
        (tmp_path / f"{count}.jsonl").write_bytes(b"".join(lines[: 1 + count]))
        stores[count] = TraceStore.read(tmp_path / f"{count}.jsonl")
    store = TraceStore.read(trace_store)
    hashes = {count: before.sha256() for count, before in stores.items()}
    assert store.used([hashes[9], hashes[5]]) == 9
    assert store.used([store.sha256()]) == len(store)
    assert store.used([hashes[0], "another"]) == 0
    assert stores[5].used([hashes[9]]) == 0


def test_fresh_traces_are_those_after_them_counted_without_repeating_ends(trace_store, tmp_path):
    store = TraceStore.read(trace_store)
    traces = list(store)
    fresh = store.fresh(5, 100)
    assert fresh == traces[5 : 5 + len(fresh)]
    assert sum(t.tokens for t in fresh[:-1]) < 100 <= sum(t.tokens for t in fresh)
    assert store.fresh(len(traces), 100) == []
    loops = [trace(str(i), tokens=[*range(i), *(5, 6) * 50], finish="length") for i in range(4)]
    with TraceStore.open_append(tmp_path / "loops.jsonl", store.header) as repeating:
        repeating.append_many(loops)
    fresh = repeating.fresh(1, 7)
    assert fresh == loops[1:3]


def answered(problem, text, answer="5", sample=0):
    ids = tuple(byte_tokenizer()(text, add_special_tokens=False)["input_ids"])
    return replace(trace(problem, sample, ids), answer=answer)


def judge_of(source="arithmetic", seed=0):
    sampling = HEADER.sampling.model_copy(update={"seed": seed})
    update = {"problems": ProblemSource(source=source), "sampling": sampling}
    return Judge(byte_tokenizer(), HEADER.model_copy(update=update))


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("5</think>\\boxed{5}<|end|>", "5", True),
        ("\\boxed{5}, I think", "5", True),  # no </think>: searched whole
        ("\\boxed{5}</think>it is 5", "5", False),
        ("</think>\\boxed{0.5}", r"\frac{1}{2}", True),
    ],
)
def test_the_answer_behind_the_thinking_counts(text, answer, right):
    asked = answered("a", text, answer)
    assert list(judge_of()([asked])) == [(asked, right)]


def test_traces_are_judged_in_their_order_and_once(monkeypatch):
    monkeypatch.setattr(selection, "_TOGETHER", 7)
    traces = [answered(f"p{i}", f"</think>\\boxed{{{i % 3}}}", "1") for i in range(20)]
    judge = judge_of()
    verdicts = [(asked, i % 3 == 1) for i, asked in enumerate(traces)]
    assert list(judge(iter(traces))) == verdicts
    monkeypatch.setattr(selection, "extract_answer", None)
    assert list(judge(traces)) == verdicts


def test_reasoning_gym_judges_its_own_tasks():
    """Also beyond its first chunk of problems, and by the seed of the store."""
    source = "reasoning-gym:spell_backward"
    problems = list(islice(load_problems(ProblemSource(source=source), seed=5), 502))
    traces = []
    for problem in (problems[0], problems[501]):
        traces.append(answered(problem.id, f"</think>\\boxed{{{problem.answer}}}", "not looked at"))
        traces.append(answered(problem.id, "</think>\\boxed{nonsense}", problem.answer, sample=1))
    verdicts = [right for _, right in judge_of(source, seed=5)(traces)]
    assert verdicts == [True, False, True, False]


def test_without_a_reference_the_error_says_what_to_set():
    with pytest.raises(RacError, match=r"trace 'a#0' has no reference answer.*answer_column"):
        list(judge_of()([answered("a", "</think>\\boxed{5}", None)]))
