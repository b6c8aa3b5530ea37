"""Headers, a long store, and collecting from a fake server without the model's weights."""

import pytest

from rac_modifier.problems.source import load_problems
from rac_modifier.sampling.completions_api import trace_seed
from rac_modifier.sampling.generate import render_question
from rac_modifier.settings.calibration import TraceSettings
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.collect import collect_traces
from tests import tiny
from tests.sampling import conftest as sampling
from tests.sampling.fake_server import rule
from tests.tiny import tiny_model
from tests.traces.long_store import fill

identity, server, tokenizer = sampling.identity, sampling.server, sampling.tokenizer
short_pauses = sampling.short_pauses
LONGEST = 20  # tokens of a completion


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def collect(server, identity, tokenizer, tmp_path):
    def collect(name="s.jsonl", *, of=identity, urls=None, tokens=3000, engine=True, **changes):
        servers = {"base_urls": urls or (server.url,), "concurrency": 8, "verify_model": False}
        settings = TraceSettings(
            store=str(tmp_path / name),
            sampling=SamplingSettings(temperature=1.0, max_new_tokens=LONGEST),
            engine=EngineSettings(**{**servers, **changes}) if engine else None,
        )
        return collect_traces(of, tokenizer, settings, tokens)

    return collect


@pytest.fixture
def is_exact(tokenizer):
    """Whether each trace is what the server's rule gives for its prompt and seed, in the order of
    the problems."""

    def is_exact(store):
        problems = load_problems(ProblemSource(), 0)
        for trace in store:
            problem = next(p for p in problems if p.id == trace.problem_id)
            prompt = render_question(tokenizer, problem.question)
            body = {"seed": trace_seed(0, trace.id), "prompt": prompt, "max_tokens": LONGEST}
            assert list(trace.prompt_ids) == prompt
            assert list(trace.completion_ids) == rule(body)
            assert trace.finish_reason == ("stop" if trace.completion_ids[-1] == 1 else "length")
        return True

    return is_exact


@pytest.fixture(scope="package")
def byte_tokenizer():
    return tiny.byte_tokenizer()


@pytest.fixture(scope="package")
def long_store(byte_tokenizer, tmp_path_factory):
    """499 traces."""
    return fill(tmp_path_factory.mktemp("store") / "s.jsonl", byte_tokenizer)
