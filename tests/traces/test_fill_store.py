"""In which order traces are stored, what is kept beside them, and what is asked for, with an engine that follows a script."""

import json
from itertools import islice

import pytest

from rac_modifier.errors import RacError
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.engine import Completion, EngineRecord, Failure
from rac_modifier.sampling.generate import Generation
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings
from rac_modifier.traces import fill_store
from rac_modifier.traces.failures import failures_path, read_failures
from rac_modifier.traces.fill_store import FillStore, pending_path
from rac_modifier.traces.store import StoreHeader, TraceStore

TOKENS = 10  # of each trace: 2 of the prompt and 8 of the completion


class Script:
    """Completes `together` prompts at a time, the last one first; `failing` and `fatal` name prompts by their keys."""

    kind = "openai"

    def __init__(self, together=1, batch_size=1, failing=(), fatal=()):
        self.together, self.batch_size, self.failing, self.fatal = (
            together,
            batch_size,
            set(failing),
            set(fatal),
        )
        self.asked = []  # batches of keys
        self.connected = 0

    def connect(self):
        self.connected += 1
        return EngineRecord(kind=self.kind)

    def close(self):
        pass

    def iter_completions(self, batches):
        batches = iter(batches)
        while True:
            taken = list(islice(batches, self.together))
            if not taken:
                return
            self.asked += [[prompt.key for prompt in batch] for batch in taken]
            for batch in reversed(taken):
                if any(prompt.key in self.fatal for prompt in batch):
                    raise RacError("no server will do it")
                yield [Completion(prompt, self.outcome(prompt)) for prompt in reversed(batch)]

    def outcome(self, prompt):
        return (
            Failure("broken")
            if prompt.key in self.failing
            else Generation((*prompt.ids, *range(6)), "stop")
        )

    @property
    def keys(self):
        return [key for batch in self.asked for key in batch]


@pytest.fixture
def fill(tmp_path):
    path = tmp_path / "s.jsonl"

    def fill(engine, tokens, *, count=100, samples=1, refuse=lambda length: None, kind="openai"):
        header = StoreHeader(
            fingerprint="f",
            model="m",
            tokenizer="t",
            sampling=SamplingSettings(samples_per_problem=samples).resolved(None),
            problems=ProblemSource(),
            engine=EngineRecord(kind=kind),
        )
        problems = (Problem(f"p{i}", f"{i}?", str(i), None) for i in range(count))
        with TraceStore.open_append(path, header) as store:
            filling = FillStore(
                store, engine, problems, lambda problem: [3, int(problem.question[:-1])], refuse
            )
            return filling.run(tokens, progress=False), filling.failed

    fill.path = path
    return fill


def stored(path):
    return [trace.id for trace in TraceStore.read(path)]


def ids(*numbers):
    return [f"p{i}#0" for i in numbers]


@pytest.mark.parametrize("together", [1, 2, 7])
def test_the_store_is_in_the_order_of_the_problems(fill, together):
    """The shortest run of problems that holds the tokens, whatever is finished first."""
    engine = Script(together)
    assert fill(engine, 5 * TOKENS - 3) == (5 * TOKENS, 0)
    traces = list(TraceStore.read(fill.path))
    assert [one.id for one in traces] == ids(*range(5))
    assert [(one.prompt_ids, one.completion_ids[:2], one.answer) for one in traces[:2]] == [
        ((3, 0), (3, 0), "0"),
        ((3, 1), (3, 1), "1"),
    ]
    assert engine.connected >= 1


def test_many_stored_traces_are_passed_over(fill, monkeypatch):
    """More than are passed over at once."""
    monkeypatch.setattr(fill_store, "_LONGEST_QUEUE", 4)
    fill(Script(), 31 * TOKENS)
    engine = Script()
    assert fill(engine, 32 * TOKENS) == (32 * TOKENS, 0)
    assert engine.keys == ids(31)


def test_every_problem_is_sampled_as_often_as_the_settings_say(fill):
    fill(Script(), 5 * TOKENS, samples=2)
    assert stored(fill.path) == ["p0#0", "p0#1", "p1#0", "p1#1", "p2#0"]


def test_a_batch_is_asked_for_as_a_whole_where_part_of_it_is_stored(fill):
    fill(Script(batch_size=4), 6 * TOKENS)
    engine = Script(batch_size=4)
    fill(engine, 7 * TOKENS)
    assert engine.asked == [ids(4, 5, 6, 7)]
    assert stored(fill.path) == ids(*range(7))


def test_what_is_finished_before_an_earlier_one_is_kept_beside_the_store(fill):
    with pytest.raises(RacError, match="no server will do it"):
        fill(Script(together=4, fatal=ids(1)), 9 * TOKENS)
    assert stored(fill.path) == []
    assert stored(pending_path(fill.path)) == ids(3, 2)
    engine = Script(together=2)
    fill(engine, 4 * TOKENS)
    assert engine.keys == ids(0, 1)
    assert stored(fill.path) == ids(0, 1, 2, 3)
    assert not pending_path(fill.path).exists()


def test_what_is_finished_beyond_the_budget_is_kept_for_a_larger_one(fill):
    fill(Script(together=4), 2 * TOKENS)
    assert stored(fill.path) == ids(0, 1)
    assert stored(pending_path(fill.path)) == ids(3, 2, 1)
    engine = Script()
    fill(engine, 4 * TOKENS)
    assert engine.asked == []
    assert not pending_path(fill.path).exists()


def test_an_engine_that_keeps_the_order_writes_no_second_store(fill):
    """Not for the rest of its last batch either, which costs little to sample again."""
    fill(Script(batch_size=4), 2 * TOKENS)
    assert stored(fill.path) == ids(0, 1)
    assert [path.name for path in fill.path.parent.iterdir()] == ["s.jsonl"]


def test_a_problem_that_fails_is_recorded_once_another_one_succeeds(fill):
    assert fill(Script(together=3, failing=ids(1)), 4 * TOKENS) == (4 * TOKENS, 1)
    assert stored(fill.path) == ids(0, 2, 3, 4)
    (failed,) = read_failures(fill.path)
    assert (failed.id, failed.question, failed.reason) == ("p1#0", "1?", "broken")
    engine = Script()
    fill(engine, 6 * TOKENS)
    assert engine.keys == ids(6)  # the fifth was finished in the first run
    assert stored(fill.path) == ids(0, 2, 3, 4, 5, 6)


def test_failures_at_the_end_of_the_problems_are_recorded(fill):
    assert fill(Script(failing=ids(3, 4)), 9 * TOKENS, count=5) == (3 * TOKENS, 2)
    assert [one.id for one in read_failures(fill.path)] == ids(3, 4)


@pytest.mark.parametrize(("failing", "ends"), [(15, False), (16, True)])
def test_sixteen_failures_in_a_row_are_an_outage_and_no_problems_failed(fill, failing, ends):
    engine = Script(failing=ids(*range(2, 2 + failing)))
    if not ends:
        assert fill(engine, 5 * TOKENS) == (5 * TOKENS, 15)
        assert stored(fill.path) == ids(0, 1, 17, 18, 19)
        return
    with pytest.raises(
        RacError, match=r"16 completions in a row failed, the last one: broken\. .*run again"
    ):
        fill(engine, 5 * TOKENS)
    assert not failures_path(fill.path).exists()
    fill(Script(), 5 * TOKENS)
    assert stored(fill.path) == ids(*range(5))


def test_prompts_that_are_refused_are_recorded_and_not_asked(fill):
    engine = Script(batch_size=3)
    refused = iter([None, "too long", None, None])
    assert fill(engine, 3 * TOKENS, refuse=lambda length: next(refused, None)) == (3 * TOKENS, 1)
    assert engine.asked == [ids(0, 2), ids(3, 4, 5)]
    assert stored(fill.path) == ids(0, 2, 3)
    assert [(one.id, one.reason) for one in read_failures(fill.path)] == [("p1#0", "too long")]


def test_only_one_kind_of_engine_fills_a_store(fill):
    with pytest.raises(
        RacError, match=r"another engine \(transformers, not openai\).*leave traces.engine out"
    ):
        fill(Script(), TOKENS, kind="transformers")


def test_failed_problems_of_an_earlier_run_are_passed_over(fill):
    line = {"id": "p0#0", "question": "0?", "reason": "earlier"}
    failures_path(fill.path).write_text(json.dumps(line) + "\n")
    assert fill(Script(), TOKENS) == (TOKENS, 1)
    assert stored(fill.path) == ids(1)
