"""Collecting from servers that fail: every finished trace once, none invented, the same file as without faults."""

import threading

from rac_modifier.traces.failures import read_failures
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
