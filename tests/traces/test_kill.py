"""A collection killed again and again ends with the file of one that ran undisturbed."""

import random
from itertools import count

import pytest

from rac_modifier.traces.records import StoreHeader
from rac_modifier.traces.store import TraceStore
from tests.fork_server import fork_server
from tests.sampling.fake_server import FakeServer
from tests.traces.killed_collection import collect

ENDLESS = 10**7  # tokens
KILLS = 5
SETTINGS = {"temperature": 1.0, "max_new_tokens": 10, "batch_size": 6, "samples_per_problem": 2}


@pytest.mark.parametrize("served", [False, True])
def test_kills_lose_and_double_nothing(tmp_path, served):
    path, rng = tmp_path / "killed.jsonl", random.Random(0)
    server = FakeServer() if served else None
    arrived = count()
    if server:  # traces finish in another order than their problems: each eighth waits for the next
        server.delay = lambda body: 0.02 * (next(arrived) % 8 == 0)
    url = server.url if server else None
    finished = set()
    for _ in range(KILLS):
        arguments = (str(path), SETTINGS, ENDLESS, url, rng.randrange(3, 40))
        child = fork_server().Process(target=collect, args=arguments)
        child.start()
        child.join()
        assert child.exitcode == -9, "the collection ended before it was killed"
        files = [p for p in (path, TraceStore.pending_path(path)) if p.exists()]
        assert any(not p.read_bytes().endswith(b"\n") for p in files), "a torn line"
        stored = {trace.id for p in files if StoreHeader.read(p) for trace in TraceStore.read(p)}
        assert finished <= stored
        finished = stored
    tokens = 500 + sum(TraceStore.read(p).counts.tokens for p in files if StoreHeader.read(p))
    for name in ("killed.jsonl", "undisturbed.jsonl"):
        collect(str(tmp_path / name), SETTINGS, tokens, url)
    if server:
        server.close()
    assert TraceStore.read(path).counts.tokens >= tokens
    assert path.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()
