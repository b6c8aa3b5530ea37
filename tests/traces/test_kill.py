"""A collection killed again and again ends with the file of one that ran undisturbed."""

import multiprocessing
import random
import time

import pytest
from slow_collection import collect_slowly
from tiny import tiny_model, tiny_tokenizer

from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.generation import SamplingSettings
from rac_modifier.traces.problems import ProblemSource

SETTINGS = {"temperature": 1.0, "max_new_tokens": 10, "batch_size": 6, "samples_per_problem": 2}
TOKENS = 30_000
KILLS = 20


@pytest.mark.slow
def test_twenty_kills_lose_and_double_nothing(tmp_path):
    # A fork server imports torch once, in a process without threads; each child is then a quick and safe fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slow_collection", "rac_modifier.traces.collect"])
    path = tmp_path / "killed.jsonl"
    rng = random.Random(0)
    torn = 0
    for _ in range(KILLS):
        size = path.stat().st_size if path.exists() else 0
        child = context.Process(target=collect_slowly, args=(str(path), SETTINGS, TOKENS))
        child.start()
        # Wait until it writes, so that every kill hits a run at work, then let it go on for a random while.
        deadline = time.monotonic() + 60
        while (path.stat().st_size if path.exists() else 0) <= size:
            assert child.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.25))
        child.kill()
        child.join()
        assert child.exitcode == -9, "the collection ended before it was killed: raise TOKENS"
        torn += not path.read_bytes().endswith(b"\n")
    assert torn >= 3, "hardly any kill hit a write: the test shows nothing"

    def finish(name):
        return collect_traces(
            tiny_model(),
            tiny_tokenizer(),
            tmp_path / name,
            problems=ProblemSource(),
            sampling=SamplingSettings(**SETTINGS),
            tokens=TOKENS,
            progress=False,
        )

    resumed, undisturbed = finish("killed.jsonl"), finish("undisturbed.jsonl")
    assert resumed.counts.tokens >= TOKENS
    assert resumed.sha256() == undisturbed.sha256()
