"""The real `vllm serve`, where there is one: named by RAC_VLLM, or `vllm` on the PATH."""

import os

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier.errors import RacError
from rac_modifier.reasoner import reasoner_path
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.collect import collect_traces
from tests.vllm_server import NEEDS_SERVER, served

pytestmark = NEEDS_SERVER


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The embedded reasoner, served on loopback; or what RAC_VLLM_URL names, which is left running."""
    if running := os.environ.get("RAC_VLLM_URL"):
        yield running
        return
    with served(reasoner_path(), tmp_path_factory.mktemp("vllm") / "log") as address:
        yield address


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(reasoner_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(reasoner_path(), dtype="float32")


def collect(path, model, tokenizer, url, sampling, tokens=4000):
    return collect_traces(
        model,
        tokenizer,
        path,
        problems=ProblemSource(),
        sampling=sampling,
        tokens=tokens,
        engine=None if url is None else EngineSettings(base_urls=(url,), concurrency=16),
        progress=False,
    )


def test_greedy_traces_are_those_of_this_process(url, model, tokenizer, tmp_path):
    """EOS and thinking tags included, as both are in float32."""
    sampling = SamplingSettings(temperature=0, max_new_tokens=512, batch_size=16)
    served = collect(tmp_path / "served.jsonl", model, tokenizer, url, sampling)
    own = collect(tmp_path / "own.jsonl", model, tokenizer, None, sampling)
    assert list(served) == list(own)
    assert served.counts.finished == len(served)
    assert all(trace.completion_ids[-1] == tokenizer.eos_token_id for trace in served)


def test_sampled_traces_follow_their_seeds(url, tokenizer, tmp_path):
    subject = ModelIdentity.of_files(str(reasoner_path()))
    sampling = SamplingSettings(temperature=1.5, top_p=1, max_new_tokens=128)
    first = collect(tmp_path / "a.jsonl", subject, tokenizer, url, sampling)
    again = {
        t.id: t.completion_ids
        for t in collect(tmp_path / "b.jsonl", subject, tokenizer, url, sampling)
    }
    other = collect(
        tmp_path / "c.jsonl", subject, tokenizer, url, sampling.model_copy(update={"seed": 1})
    )
    # A server's rounding depends on what it computes together, so a rare token may differ.
    assert sum(again.get(t.id) == t.completion_ids for t in first) > 0.8 * len(first)
    assert {t.completion_ids for t in first}.isdisjoint(t.completion_ids for t in other)


def test_another_model_is_noticed(url, model, tokenizer, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(reasoner_path(), dtype="float32")
    for layer in other.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    with pytest.raises(RacError, match="holds another model"):
        collect(tmp_path / "s.jsonl", other, tokenizer, url, SamplingSettings(max_new_tokens=64))
