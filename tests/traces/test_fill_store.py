"""In which order traces are stored, their side files, and what is asked, with an engine that
follows a script."""

from itertools import islice

import pytest

from rac_modifier.errors import RacError
from rac_modifier.problems.source import Problem
from rac_modifier.sampling.engine import EngineRecord, Failure
from rac_modifier.sampling.generate import Generation
from rac_modifier.traces import fill_store
from rac_modifier.traces.fill_store import FillStore
from rac_modifier.traces.store import FailedProblem, TraceStore
from tests.traces.long_store import HEADER

TOKENS = 10  # of each trace: 2 of the prompt and 8 of the completion


class Script:
    """Completes `together` prompts at a time, the last one first; `failing` and `fatal` name
    prompts by their keys."""

    kind = "openai"

    def __init__(self, together=1, batch_size=1, failing=(), fatal=(), of_servers=False):
        self.together, self.batch_size = together, batch_size
        self.failing, self.fatal = set(failing), set(fatal)
        self.of_servers = of_servers  # whether failures are
        self.asked = []  # batches of keys

    def connect(self):
        return EngineRecord(kind=self.kind)

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
                yield [(prompt, self.outcome(prompt)) for prompt in reversed(batch)]

    def outcome(self, prompt):
        return (
            Failure("broken", self.of_servers)
            if prompt.key in self.failing
            else Generation((*prompt.ids, *range(6)), "stop")
        )

    @property
    def keys(self):
        return [key for batch in self.asked for key in batch]


def prompt_of(tokenizer, question, sampling):
    return [3, int(question[:-1])]


@pytest.fixture
def fill(tmp_path, monkeypatch):
    path = tmp_path / "s.jsonl"
    monkeypatch.setattr(fill_store, "render_question", prompt_of)

    def fill(engine, tokens, *, longest=None):
        header = HEADER.model_copy(update={"engine": EngineRecord(kind="openai")})
        problems = (Problem(f"p{i}", f"{i}?", str(i), None) for i in range(100))
        with TraceStore.open_append(path, header) as store:
            filling = FillStore(store, engine, problems, None, longest)
            return filling.run(tokens), len(filling.failed)

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
    assert [trace.id for trace in traces] == ids(*range(5))
    assert (traces[1].prompt_ids, traces[1].completion_ids[:2]) == ((3, 1), (3, 1))
    assert traces[1].answer == "1"


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
    assert stored(TraceStore.pending_path(fill.path)) == ids(3, 2)
    engine = Script(together=2)
    fill(engine, 4 * TOKENS)
    assert engine.keys == ids(0, 1)
    assert stored(fill.path) == ids(0, 1, 2, 3)
    assert not TraceStore.pending_path(fill.path).exists()


def test_what_is_finished_beyond_the_budget_is_kept_for_a_larger_one(fill):
    fill(Script(together=4), 2 * TOKENS)
    assert stored(fill.path) == ids(0, 1)
    assert stored(TraceStore.pending_path(fill.path)) == ids(3, 2, 1)
    engine = Script()
    fill(engine, 4 * TOKENS)
    assert engine.asked == []
    assert not TraceStore.pending_path(fill.path).exists()


def test_a_problem_that_fails_is_recorded_once_another_one_succeeds(fill):
    assert fill(Script(together=3, failing=ids(1)), 4 * TOKENS) == (4 * TOKENS, 1)
    assert stored(fill.path) == ids(0, 2, 3, 4)
    (failed,) = FailedProblem.read(fill.path)
    assert (failed.id, failed.question, failed.reason) == ("p1#0", "1?", "broken")
    engine = Script()
    fill(engine, 6 * TOKENS)
    assert engine.keys == ids(6)  # the fifth was finished in the first run
    assert stored(fill.path) == ids(0, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(("failing", "ends"), [(15, False), (16, True)])
def test_sixteen_failures_in_a_row_are_an_outage_and_no_problems_failed(fill, failing, ends):
    engine = Script(failing=ids(*range(2, 2 + failing)))
    if not ends:
        assert fill(engine, 5 * TOKENS) == (5 * TOKENS, 15)
        assert stored(fill.path) == ids(0, 1, 17, 18, 19)
        return
    with pytest.raises(RacError, match=r"16 completions in a row failed, .* broken\. .*run again"):
        fill(engine, 5 * TOKENS)
    assert not FailedProblem.path(fill.path).exists()
    fill(Script(), 5 * TOKENS)
    assert stored(fill.path) == ids(*range(5))


def test_a_failure_of_the_servers_ends_the_run_and_its_problem_is_asked_again(fill):
    engine = Script(together=3, failing=ids(1), of_servers=True)
    with pytest.raises(RacError, match=r"could not complete a prompt: broken\. .*run again"):
        fill(engine, 4 * TOKENS)
    assert not FailedProblem.path(fill.path).exists()
    engine = Script()
    assert fill(engine, 4 * TOKENS) == (4 * TOKENS, 0)
    assert ids(1)[0] in engine.keys
    assert stored(fill.path) == ids(*range(4))


def test_prompts_that_are_too_long_are_recorded_and_not_asked(fill, monkeypatch):
    monkeypatch.setattr(
        fill_store,
        "render_question",
        lambda tokenizer, question, sampling: [3, int(question[:-1]), *([4] * (question == "1?"))],
    )
    engine = Script(batch_size=3)
    assert fill(engine, 3 * TOKENS, longest=2) == (3 * TOKENS, 1)
    assert engine.asked == [ids(0, 2), ids(3, 4, 5)]
    assert stored(fill.path) == ids(0, 2, 3)
    assert [(failed.id, failed.reason) for failed in FailedProblem.read(fill.path)] == [
        ("p1#0", "a prompt of 3 tokens; the limit is 2")
    ]
