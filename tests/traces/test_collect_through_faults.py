"""Collecting from servers that fail: every finished trace once, none invented, the same file as without faults."""

import threading

import pytest

from rac_modifier.errors import RacError
from rac_modifier.problems.source import load_problems
from rac_modifier.sampling.completions_api import trace_seed
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.traces.failures import failures_path, read_failures
from rac_modifier.traces.fill_store import pending_path
from rac_modifier.traces.store import TraceStore
from tests.sampling.fake_server import FakeServer


def test_twenty_faults_leave_the_same_file(collect, server, is_exact):
    quiet = collect("a.jsonl")
    kinds = [
        "hang",
        "500",
        "429",
        "reset",
        "truncate",
        "garbage",
        "503",
        "short",
        "miscount",
        "500",
    ] * 2
    first = len(server.bodies)
    server.fault = lambda number, body: (
        kinds[(number - first) // 3] if (number - first) % 3 == 1 and number - first < 60 else None
    )
    noisy = collect("b.jsonl", timeout=0.5)
    assert server.faults.total() == 20
    assert noisy.sha256() == quiet.sha256()
    assert is_exact(noisy)
    assert read_failures(noisy.path) == []


def test_what_finished_early_is_kept_for_a_larger_budget(collect, server, tmp_path):
    """The first problem hangs and the run is ended: the others, finished behind it, are not asked for again."""
    first = next(load_problems(ProblemSource(), 0))
    blocked = trace_seed(0, f"{first.id}#0")
    server.fault = lambda number, body: (
        "401"
        if body["seed"] == blocked and len(server.bodies) > 20
        else ("500" if body["seed"] == blocked else None)
    )
    with pytest.raises(RacError, match="api_key_env"):
        collect(tries=1000)
    pending = TraceStore.read(pending_path(tmp_path / "s.jsonl"))
    assert len(pending) >= 8
    assert len(TraceStore.read(tmp_path / "s.jsonl")) == 0
    asked = {b["seed"] for b in server.bodies}
    server.fault = lambda number, body: None
    before = len(server.bodies)
    store = collect()
    done = {trace_seed(0, t) for t in pending.ids()}
    assert not done & {b["seed"] for b in server.bodies[before:]}
    assert done < asked
    assert store.sha256() == collect("b.jsonl").sha256()


def test_two_servers_share_the_work_and_one_may_die(collect, server, is_exact):
    other = FakeServer()
    quiet = collect("a.jsonl")
    server.bodies.clear()
    other.delay = server.delay = lambda body: 0.005
    killer = threading.Timer(0.1, other.close)

    def die(number, body):
        return "reset" if number > 10 else None

    other.fault = die
    try:
        both = collect("b.jsonl", urls=(server.url, other.url))
    finally:
        killer.cancel()
        other.close()
    assert both.sha256() == quiet.sha256()
    assert len(other.bodies) > 5
    assert len(server.bodies) > 5


def test_a_problem_that_fails_goes_to_the_side_file_and_is_tried_again_on_request(collect, server):
    quiet = collect("a.jsonl")
    third = list(quiet)[2]
    server.fault = lambda number, body: "400" if body["seed"] == trace_seed(0, third.id) else None
    store = collect("b.jsonl")
    assert third.id not in store
    (failed,) = read_failures(store.path)
    assert failed.id == third.id
    assert "told to answer 400" in failed.reason
    assert list(store)[:-1] == [t for t in quiet if t.id != third.id][: len(store) - 1]

    server.fault = lambda number, body: None
    before = len(server.bodies)
    assert third.id not in collect("b.jsonl")
    assert len(server.bodies) == before
    again = collect("b.jsonl", retry_failed=True)
    assert set(quiet) <= set(again)
    assert not failures_path(store.path).exists()


def test_an_outage_ends_the_run_and_marks_no_problem(collect, server, tmp_path):
    quiet = collect("a.jsonl")
    first = len(server.bodies) + 30
    server.fault = lambda number, body: "500" if number > first else None
    # What was asked for before has come back by then: a success between the failures would make them bad problems.
    server.delay = lambda body: 0.3 if len(server.bodies) > first else 0
    with pytest.raises(
        RacError, match=r"in a row failed.*told to answer 500.*tried 2 times.*run again"
    ):
        collect("b.jsonl", tries=2)
    assert read_failures(tmp_path / "b.jsonl") == []
    server.fault, server.delay = lambda number, body: None, lambda body: 0
    assert collect("b.jsonl").sha256() == quiet.sha256()
