"""A collection killed again and again ends with the file of one that ran undisturbed."""

import random
import time

import pytest

from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.fill_store import pending_path
from rac_modifier.traces.store import TraceStore, read_header
from tests.fork_server import fork_server
from tests.sampling.fake_server import FakeServer
from tests.tiny import tiny_model, tiny_tokenizer
from tests.traces.slow_collection import collect_slowly

ENDLESS = 10**7  # tokens
SETTINGS = {"temperature": 1.0, "max_new_tokens": 10, "batch_size": 6, "samples_per_problem": 2}


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kills"), [("in_process", 20), ("server", 50)])
def test_kills_lose_and_double_nothing(tmp_path, engine, kills):
    context = fork_server()
    path = tmp_path / "killed.jsonl"
    rng = random.Random(0)
    server = None
    if engine == "server":
        server = FakeServer()
        server.delay = lambda body: rng.choice(
            [0, 0, 0.05]
        )  # so that traces finish in another order than their problems
    url = server.url if server else None
    torn, finished = 0, set()
    for _ in range(kills):
        size = written(path)
        child = context.Process(target=collect_slowly, args=(str(path), SETTINGS, ENDLESS, url))
        child.start()
        # Wait until it writes, so that every kill hits a run at work, then let it go on for a random while.
        deadline = time.monotonic() + 300  # a busy machine
        while written(path) <= size:
            assert child.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.25))
        child.kill()
        child.join()
        assert child.exitcode == -9, "the collection ended before it was killed"
        torn += any(not p.read_bytes().endswith(b"\n") for p in files(path))
        now = {trace.id for p in files(path) if read_header(p) for trace in TraceStore.read(p)}
        assert finished <= now
        finished = now
    assert torn >= 3, "hardly any kill hit a write: the test shows nothing"
    tokens = 500 + sum(TraceStore.read(p).counts.tokens for p in files(path))

    def finish(name):
        model = tiny_model()
        return collect_traces(
            ModelIdentity.of_model(model) if url else model,
            tiny_tokenizer(),
            tmp_path / name,
            problems=ProblemSource(),
            sampling=SamplingSettings(**SETTINGS),
            tokens=tokens,
            engine=EngineSettings(base_urls=(url,), concurrency=8) if url else None,
            progress=False,
        )

    resumed, undisturbed = finish("killed.jsonl"), finish("undisturbed.jsonl")
    if server:
        server.close()
    assert resumed.counts.tokens >= tokens
    assert resumed.sha256() == undisturbed.sha256()


def files(path):
    return [p for p in (path, pending_path(path)) if p.exists()]


def written(path):
    return sum(p.stat().st_size for p in files(path))
