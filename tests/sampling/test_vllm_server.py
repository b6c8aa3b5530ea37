"""The real `vllm serve`, where there is one: named by RAC_VLLM, or `vllm` on the PATH."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier.reasoner import reasoner_path
from rac_modifier.settings.calibration import TraceSettings
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.collect import collect_traces
from tests.vllm_server import NEEDS_SERVER, served

pytestmark = NEEDS_SERVER


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The embedded reasoner, served on loopback."""
    with served(reasoner_path(), tmp_path_factory.mktemp("vllm") / "log") as address:
        yield address


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(reasoner_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(reasoner_path(), dtype="float32")


def collect(path, model, tokenizer, url, sampling):
    settings = TraceSettings(
        store=str(path),
        sampling=sampling,
        engine=None if url is None else EngineSettings(base_urls=[url], concurrency=16),
    )
    return collect_traces(model, tokenizer, settings, 4000)


def test_greedy_traces_are_those_of_this_process(url, model, tokenizer, tmp_path):
    """EOS and thinking tags included, as both are in float32."""
    sampling = SamplingSettings(temperature=0, max_new_tokens=512, batch_size=16)
    served = collect(tmp_path / "served.jsonl", model, tokenizer, url, sampling)
    own = collect(tmp_path / "own.jsonl", model, tokenizer, None, sampling)
    assert list(served) == list(own)
    assert served.counts.finished == len(served)
    assert all(trace.completion_ids[-1] == tokenizer.eos_token_id for trace in served)
