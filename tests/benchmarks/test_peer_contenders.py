"""What each contender of peers.py needs, with which options it runs, and what of its time counts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from types import SimpleNamespace

import pytest


def test_what_each_contender_needs(peers, monkeypatch):
    import peer_contenders

    assert peer_contenders.not_installed("llama.cpp Q4_0") == "not installed: gguf"
    assert peer_contenders.not_installed("linears, dense int4, head int4") is None
    assert peer_contenders.not_installed("in Python, 50 % + int4, head int4") is None
    monkeypatch.setattr(peer_contenders, "find_spec", lambda package: None)
    assert peer_contenders.not_installed("llama.cpp Q8_0") == "not installed: xllamacpp and gguf"
    needs = {
        "openvino": "OpenVINO linears, int4, head int4",
        "torchao": "torchao linears, int4, head int4",
        "vllm": "vLLM, dense bfloat16",
    }
    assert {package: peer_contenders.not_installed(name) for package, name in needs.items()} == {
        package: f"not installed: {package}" for package in needs
    }


def test_llama_times_one_step_less_than_tokens(tables, monkeypatch, tmp_path):
    """Its server starts the clock of generation when the first token is there, and counts that token."""
    import peer_contenders

    timings = {"prompt_n": 4, "prompt_ms": 100.0, "predicted_n": 9, "predicted_ms": 80.0}
    params = SimpleNamespace(
        model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace()
    )
    server = SimpleNamespace(handle_completions=lambda body: {"timings": timings})
    llama = SimpleNamespace(CommonParams=lambda: params, Server=lambda params: server)
    monkeypatch.setitem(sys.modules, "xllamacpp", llama)
    writes = SimpleNamespace(write_gguf=lambda path, *_: path.write_bytes(bytes(5)))
    monkeypatch.setitem(sys.modules, "gguf_model", writes)
    args = SimpleNamespace(
        keep=tmp_path, layers=1, vocab=16, prompt_tokens=4, output_tokens=9, threads=1
    )
    found = peer_contenders.llama("llama.cpp Q4_0", args)
    assert (found.weight_bytes, found.ms_per_token, found.first_token_s) == (5, 10.0, 0.1)
    assert found.tokens_per_s == pytest.approx(9 / 0.18)


@pytest.mark.parametrize(
    ("suffix", "options", "environment"),
    [
        ("", [], {}),
        (
            ", one process",
            ["--distributed-executor-backend", "uni"],
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        ),
        (
            ", one process, step in C++",
            ["--distributed-executor-backend", "uni", "--compilation-config"],
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_LAYERNAME": "0"},
        ),
    ],
)
def test_the_suffix_of_a_served_contender_sets_its_options(
    tables, monkeypatch, tmp_path, suffix, options, environment
):
    import peer_contenders

    seen = []

    @contextlib.contextmanager
    def serving(folder, options, log, environment):
        seen.append((options, environment))
        yield SimpleNamespace(url="")

    speed = SimpleNamespace(each_token_ms=1.0, first_token_ms=1.0, tokens_per_second=1.0)
    client = SimpleNamespace(Load=lambda *_: None, measure=lambda *_: speed)
    monkeypatch.setitem(sys.modules, "streaming_client", client)
    monkeypatch.setitem(sys.modules, "vllm_server", SimpleNamespace(serving=serving))
    monkeypatch.setitem(
        sys.modules, "random_model", SimpleNamespace(save_model=lambda *_, **__: None)
    )
    args = SimpleNamespace(keep=tmp_path, layers=1, vocab=16, prompt_tokens=1, output_tokens=1)
    name = f"served, 50 % + int4, head int4{suffix}"
    peer_contenders.served(name, args)
    ((found, variables),) = seen
    assert [
        option for option in found if option in {*options, "uni", "--compilation-config"}
    ] == options
    assert variables == {"RAC_LM_HEAD": "int4", **environment}
    if "--compilation-config" in found:
        config = json.loads(found[found.index("--compilation-config") + 1])
        assert config == {"inductor_compile_config": {"cpp_wrapper": True}}
    assert tables.kl_of(name, {"50 % + int4": 0.2}) == 0.2


@pytest.fixture
def engine(tables, monkeypatch, tmp_path):
    """vLLM's engine for `in_python`: a step of the prompt takes 3 s, each further one 0.5 s, on a clock of its own."""
    import peer_contenders

    now, left, asked = [0.0], [0], {}

    def step():
        now[0] += 3.0 if left[0] == asked["tokens"] else 0.5
        left[0] -= 1
        return ["token"]

    def add_request(number, prompt, sampling):
        assert len(prompt["prompt_token_ids"]) == 4
        left[0] = asked["tokens"]

    def made(**options):
        asked["options"] = options
        for text in asked.get("warns", []):
            logging.getLogger("vllm.rac").warning(text)
        unfinished = SimpleNamespace(
            add_request=add_request, step=step, has_unfinished_requests=lambda: left[0] > 0
        )
        return SimpleNamespace(llm_engine=unfinished)

    def sampling(max_tokens, **_):
        asked["tokens"] = max_tokens

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=made, SamplingParams=sampling))
    monkeypatch.setitem(
        sys.modules, "random_model", SimpleNamespace(save_model=lambda *_, **__: None)
    )
    monkeypatch.setattr(peer_contenders.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    args = SimpleNamespace(keep=tmp_path, layers=1, vocab=16, prompt_tokens=4, output_tokens=9)
    return SimpleNamespace(run=lambda name: peer_contenders.in_python(name, args), asked=asked)


def test_an_engine_in_this_process_is_timed_step_by_step(tables, engine):
    figures = engine.run("in Python, 50 % + int4, head int4")
    assert (figures.first_token_s, figures.ms_per_token) == (3.0, 500.0)
    assert figures.tokens_per_s == pytest.approx(9 / 7.0)
    assert "quantization" not in engine.asked["options"]
    assert os.environ["RAC_LM_HEAD"] == "int4"
    assert tables.kl_of("in Python, 50 % + int4, head int4", {"50 % + int4": 0.2}) == 0.2
    engine.run("in Python, dense int4, ours, head int4")
    assert engine.asked["options"]["quantization"] == "rac"


def test_dense_codes_that_vllms_own_method_ran_are_no_contender_of_ours(engine):
    engine.asked["warns"] = ["--quantization rac has no effect on this model here; leave it out"]
    with pytest.raises(SystemExit, match="vLLM's own method ran it"):
        engine.run("in Python, dense int4, ours, head int4")
