"""`rac eval` with answers in a file: a served model paired with a dense
one."""

import json
import shutil
from contextlib import contextmanager

import pytest
from transformers import AutoTokenizer

from rac_modifier.cli.models import engine_of, own_server
from rac_modifier.settings.sampling import SamplingSettings
from tests.sampling import fake_vllm
from tests.sampling.fake_server import FakeServer

FEW = ("--problems", 3, "--cap", 8)


def test_a_long_answer_among_many_has_time():
    for at_once, cap, seconds in ((4, 100, 600), (64, 512, 3276.8), (4096, 32768, 1e6)):
        assert engine_of(("http://127.0.0.1:1",), at_once, cap).timeout == seconds


@pytest.fixture
def server():
    server = FakeServer()
    yield server
    server.close()


def test_a_served_model_is_paired_with_the_dense_one(rac, tiny_folder, tmp_path, server):
    assert rac("eval", tiny_folder, *FEW, "--json", "dense.json")[0] == 0
    server.cards = [{"id": "tiny", "root": str(tiny_folder), "max_model_len": 512}]
    options = ("--server", server.url, "--baseline", "dense.json", "--json", "-")
    results = json.loads(rac.output("eval", tiny_folder, *FEW, *options))
    assert results["results"][0]["problems"] == results["paired"][0]["problems"] == 3
    assert len(list((tmp_path / "rac_answers").glob("*.jsonl"))) == 2
    asked = len(server.bodies)
    out = rac.output("eval", tiny_folder, *FEW, *options[:4])
    assert len(server.bodies) == asked
    assert "McNemar p = 1" in out


def test_two_servers_are_compared_without_a_model_folder(rac, server):
    """Both have one name: the addresses tell the rows apart."""

    def chat(body):
        message = {"content": "so: " + "wait, I check " * 30}
        choice = {"message": message, "finish_reason": "length"}
        return {"choices": [choice], "usage": {"completion_tokens": body["max_tokens"]}}

    dense = FakeServer()
    dense.chat = server.chat = chat
    servers = ("--server", dense.url, "--server", server.url)
    code, out, err = rac("eval", *servers, *FEW)
    dense.close()
    assert code == 0, err
    assert "x1.00 (1.00 to 1.00) on all 3 (truncated: the cap)" in " ".join(out.split())
    loops = "3 truncated answers repeat themselves, from 2 words on, every 4 words (medians)."
    assert f"tiny at {server.url}: {loops}" in out
    assert "Tokens are the counts of the servers." in out
    assert "no model is named" in rac("eval", *FEW)[2]


def test_a_server_with_a_key_is_asked_with_it_and_the_key_is_written_nowhere(
    rac, tmp_path, monkeypatch, server
):
    def chat(body):
        choice = {"message": {"content": "\\boxed{1}"}, "finish_reason": "stop"}
        return {"choices": [choice], "usage": {"completion_tokens": 3}}

    key = "sk-of-nobody"
    server.chat, server.key = chat, key
    command = ("eval", "--server", server.url, *FEW, "--json", "r.json")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    code, _, err = rac(*command)
    assert code == 1
    assert f"{server.url}/models answers 401" in err
    assert "export it as OPENAI_API_KEY" in err
    monkeypatch.setenv("OPENAI_API_KEY", key)
    code, out, err = rac(*command)
    assert code == 0, err
    assert len(server.bodies) == 3
    written = [path.read_text() for path in tmp_path.rglob("*.json*")]
    assert len(written) == 2
    assert all(key not in text for text in (out, err, *written))


def test_a_server_of_another_model_is_refused_before_it_is_asked(rac, tiny_folder, server):
    """The dense model in the place of the compressed one would be judged as the compressed one."""
    server.cards = [{"id": "m", "root": "/models/another", "max_model_len": 512}]
    command = ("eval", tiny_folder, *FEW, "--server", server.url)
    code, _, err = rac(*command)
    assert code == 1
    assert f"serves 'another', and the model is '{tiny_folder.name}'; name the model" in err
    assert all(body["max_tokens"] != 8 for body in server.bodies), "no problem was asked"
    assert "does not serve 'n', but 'm'" in rac(*command, "--served-as", "n")[2]
    assert rac(*command, "--served-as", "m")[0] == 0


def test_each_model_is_served_in_turn_by_a_server_that_is_stopped(
    rac, tiny_folder, sparse_folder, vllm
):
    models = [str(tiny_folder), str(sparse_folder)]
    out = rac.output("eval", *models, "--serve", *FEW, "--precision", "float32", "--json", "-")
    assert [result["label"] for result in json.loads(out)["results"]] == models
    assert [start["argv"][1] for start in fake_vllm.starts(vllm)] == models
    assert all("float32" in start["argv"] for start in fake_vllm.starts(vllm))
    assert fake_vllm.left_over(vllm) == []


def test_answers_of_a_model_that_is_served_otherwise_are_not_taken(
    rac, tiny_folder, tmp_path, vllm, monkeypatch
):
    """Each change begins a file of its own; the command without changes finds its file again."""
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    command = ("eval", model, "--serve", *FEW)
    rac.output(*command)
    (first,) = (tmp_path / "rac_answers").iterdir()
    content = first.read_bytes()

    def files_after(*options):
        rac.output(*command, *options)
        return len(list((tmp_path / "rac_answers").iterdir()))

    assert files_after("--precision", "float32") == 2
    for number, variable in enumerate(("RAC_VLLM_OPTIONS", "RAC_KERNEL"), 3):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "--seed=1")
            assert files_after() == number
    assert files_after() == 4
    assert first.read_bytes() == content
    config = json.loads((model / "config.json").read_text())
    record = {"storage": "dense", "modules": {}, "int8_activations": ["lm_head"]}
    (model / "config.json").write_text(json.dumps(config | {"rac_sparsity": record}))
    assert files_after() == 5
    cache = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": cache}))
    assert files_after() == 6


def test_each_address_has_a_file_of_answers(rac, tiny_folder, tmp_path, server):
    other = FakeServer()
    for fake in (server, other):
        fake.cards = [{"id": "tiny", "root": str(tiny_folder), "max_model_len": 512}]
        rac.output("eval", tiny_folder, *FEW, "--server", fake.url)
    other.close()
    assert len(list((tmp_path / "rac_answers").iterdir())) == 2
    asked = len(server.bodies)
    rac.output("eval", tiny_folder, *FEW, "--server", server.url.removesuffix("/v1"))
    assert len(server.bodies) == asked


def test_a_server_that_fails_is_an_error_with_its_last_lines_and_keeps_the_answers_so_far(
    rac, tiny_folder, vllm, monkeypatch
):
    options = ("--serve", "--problems", 12, "--cap", 8, "--concurrency", 1, "--answers", "a.jsonl")
    monkeypatch.setenv(fake_vllm.FAULT, "dies")
    code, _, err = rac("eval", tiny_folder, *options, "--json", "-")
    assert code == 1
    assert "vllm serve stopped with exit code 5" in err
    assert err.rstrip().endswith("RuntimeError: the engine died")
    kept = (vllm / "a.jsonl").read_bytes()
    assert len(kept.splitlines()) > 1
    monkeypatch.delenv(fake_vllm.FAULT)
    out = rac.output("eval", tiny_folder, *options, "--json", "-")
    assert json.loads(out)["results"][0]["problems"] == 12
    assert (vllm / "a.jsonl").read_bytes().startswith(kept)
    assert fake_vllm.left_over(vllm) == []


def test_a_server_of_our_own_has_room_for_twice_the_longest_prompt(
    monkeypatch, tiny_folder, tmp_path
):
    """A CPU warms up on the longest sequence that it is told."""
    told = []

    @contextmanager
    def serve(self, model, dtype, *, longest):
        told.append(longest)
        yield "http://127.0.0.1:1"

    monkeypatch.setattr("rac_modifier.sampling.own_server.VllmCommand.serve", serve)
    monkeypatch.setenv("RAC_VLLM", "/bin/true")
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    tokenizer = AutoTokenizer.from_pretrained(model)
    long = "2 + " * 100
    prompt = len(tokenizer(long)["input_ids"])
    for cap, expected in ((8, 1024), (2048, 2048 + 2 * prompt), (4096, None)):
        sampling = SamplingSettings(max_new_tokens=cap, template="none")
        with own_server(str(model), "auto", 2, [(long, sampling), ("1", sampling)]):
            assert told.pop() == expected
