"""The rows and the table of peers.py, its command, and that torchao's int4 products are those of its codes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rac_modifier.checkpoint.int32_words import unpack_words
from rac_modifier.kernels.cpu.support import support

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KEYS = ["name", "weight_bytes", "first_token_s", "ms_per_token", "tokens_per_s", "kl", "runs", "failed"]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peer_table

    return peer_table


def test_the_kl_is_that_of_the_format(tables):
    measured = {"Q4_0": 0.1, "50 % + int4": 0.2, "int4": 0.04, "int3": 0.13, "50 % + int8": 0.15}
    expected = {
        "llama.cpp Q4_0": 0.1,
        "llama.cpp Q8_0": None,
        "linears, 50 % + int4, head int8": 0.2,
        "served, 50 % + int8, head int8": 0.15,
        "linears, dense int4, head int4": 0.04,
        "linears, dense int3, head int4": 0.13,
        "served, dense int3, ours, head int4": 0.13,
        "linears, 70 % + int4, head int4": None,
        "vLLM, dense bfloat16": 0.0,
        "vLLM, dense int8 (W8A8)": None,
        "OpenVINO linears, int4, head int4": None,
        "torchao linears, int4, head int4": None,
    }
    assert {name: tables.kl_of(name, measured) for name in expected} == expected


def test_ratios_are_of_one_round_and_medians_of_all(tables):
    figures = tables.Figures
    base = {1: figures(8 * 10**8, 40.0, 2.0, 14.0), 2: figures(8 * 10**8, 80.0, 4.0, 7.0)}
    other = {2: figures(6 * 10**8, 60.0, gigabytes_per_s=20.0), 1: figures(6 * 10**8, 20.0, gigabytes_per_s=40.0)}
    rows = [
        tables.row("llama.cpp Q4_0", base, {}, None),
        tables.row("linears, dense int4, head int4", other, {"int4": 0.04}, None),
    ]
    assert [list(row) for row in rows] == [KEYS, KEYS]
    assert [row["ms_per_token"] for row in rows] == [60.0, 40.0]
    first, second = tables.table(rows).splitlines()[2:]
    assert (
        first
        == "| llama.cpp Q4_0 | 0.800 | 13.3 | - | 3.00 | 60.0 | 10.5 | 1.00x (1.00-1.00) | 1.00x (1.00-1.00) | - |"
    )
    linears = "| linears, dense int4, head int4 | 0.600 | 15.0 | 50% | - | 40.0 | - | 1.67x (1.33-2.00) | - | 0.040 |"
    assert second == linears
    python = {1: figures(1, 20.0, 1.0, 21.0), 2: figures(1, 20.0, 1.0, 14.0)}
    whole = tables.row("in Python, 50 % + int4, head int4", python, {}, None)
    assert "| 1.75x (1.50-2.00) | - |" in tables.table([rows[0], whole]).splitlines()[-1]


def test_a_missing_round_leaves_the_others_paired(tables):
    figures = tables.Figures
    base = tables.row("llama.cpp Q4_0", {2: figures(8 * 10**8, 80.0)}, {}, "failed in round 3: why")
    other = {1: figures(6 * 10**8, 20.0), 2: figures(6 * 10**8, 60.0)}
    ours = tables.row("linears, dense int4, head int4", other, {}, None)
    absent = tables.row("llama.cpp Q8_0", {}, {"Q8_0": 0.1}, "not installed: gguf")
    assert (absent["weight_bytes"], absent["ms_per_token"], absent["runs"]) == (None, None, [])
    lines = tables.table([base, ours, absent]).splitlines()
    assert "| 1.33x (1.33-1.33) |" in lines[3]
    assert lines[4] == "| llama.cpp Q8_0 |" + " - |" * 9
    assert lines[5:] == ["", "- llama.cpp Q4_0: failed in round 3: why", "- llama.cpp Q8_0: not installed: gguf"]
    without_base = tables.table([tables.row("llama.cpp Q4_0", {}, {}, "why"), ours]).splitlines()
    assert without_base[3].endswith("| - | - | - |")


@pytest.fixture
def peers(tables, monkeypatch):
    """peers.py on an environment where only gguf is missing."""
    import peer_contenders
    import peers

    monkeypatch.setattr(peer_contenders, "find_spec", lambda package: None if package == "gguf" else package)
    return peers


def test_one_that_fails_does_not_end_the_run(tables, peers, monkeypatch):
    """It is not started again; what ran before counts, and rows are saved after each round."""
    started, saved = [], []
    good, bad = "linears, dense int4, head int4", "linears, dense int3, head int4"

    def run(name, args):
        started.append(name)
        return "Broken: why" if name == bad and started.count(bad) == 2 else tables.Figures(10, float(len(started)))

    monkeypatch.setattr(peers, "run", run)
    rows, failed = peers.measure(["llama.cpp Q4_0", bad, good], SimpleNamespace(rounds=3), {}, saved.append)
    assert failed
    assert started == [bad, good, good, bad, good]
    assert [len(each) for each in saved] == [3, 3, 3]
    assert [[len(row["runs"]) for row in each] for each in saved] == [[0, 1, 1], [0, 1, 2], [0, 1, 3]]
    assert rows == saved[-1]
    assert [row["failed"] for row in rows] == ["not installed: gguf", "failed in round 2: Broken: why", None]
    assert [run["round"] for run in rows[2]["runs"]] == [1, 2, 3]
    assert (rows[1]["ms_per_token"], rows[2]["ms_per_token"]) == (1.0, 3.0)
    assert peers.measure(["llama.cpp Q4_0", good], SimpleNamespace(rounds=1), {}, saved.append)[1] is False


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


@pytest.mark.parametrize("error", [SystemExit("too few tokens"), ValueError("too few tokens"), SystemExit(1)], ids=repr)
def test_a_process_that_fails_says_why(peers, monkeypatch, capsys, error):
    def fails(name, args):
        raise error

    monkeypatch.setattr(peers, "one", fails)
    if error.args == (1,):  # of a signal
        with pytest.raises(SystemExit):
            peers.answer_of("a", None)
        return
    assert peers.answer_of("a", None) == {"failed": f"{type(error).__name__}: too few tokens"}
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "written", "reason"),
    [
        (-11, "", "its process ended with -11"),
        (0, "", "its process wrote no figures: ''"),
        (0, "late words\n", "its process wrote no figures: 'late words"),
        (0, 'words\n{"failed": "ValueError: x"}\n', "ValueError: x"),
        (0, '{"weight_bytes": 1, "ms_per_token": 2.0}\n', None),
    ],
)
def test_what_a_process_leaves(tables, peers, monkeypatch, tmp_path, code, written, reason):
    sizes = dict.fromkeys(("layers", "vocab", "prompt_tokens", "output_tokens", "threads"), 4)
    monkeypatch.setattr(
        peers.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, code, written)
    )
    found = peers.run("a", SimpleNamespace(keep=tmp_path, **sizes))
    assert found == tables.Figures(1, 2.0) if reason is None else found.startswith(reason)


def test_llama_times_one_step_less_than_tokens(tables, monkeypatch, tmp_path):
    """Its server starts the clock of generation when the first token is there, and counts that token."""
    import peer_contenders

    timings = {"prompt_n": 4, "prompt_ms": 100.0, "predicted_n": 9, "predicted_ms": 80.0}
    params = SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())
    server = SimpleNamespace(handle_completions=lambda body: {"timings": timings})
    llama = SimpleNamespace(CommonParams=lambda: params, Server=lambda params: server)
    monkeypatch.setitem(sys.modules, "xllamacpp", llama)
    writes = SimpleNamespace(write_gguf=lambda path, *_: path.write_bytes(bytes(5)))
    monkeypatch.setitem(sys.modules, "gguf_model", writes)
    args = SimpleNamespace(keep=tmp_path, layers=1, vocab=16, prompt_tokens=4, output_tokens=9, threads=1)
    found = peer_contenders.llama("llama.cpp Q4_0", args)
    assert (found.weight_bytes, found.ms_per_token, found.first_token_s) == (5, 10.0, 0.1)
    assert found.tokens_per_s == pytest.approx(9 / 0.18)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(BENCHMARKS / "peers.py"), "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(support().isa is None, reason=support().reason)
@pytest.mark.parametrize(
    ("name", "layer_bytes"), [("linears, 50 % + int4, head int4", 0.41), ("linears, dense int3, head int4", 0.44)]
)
def test_the_command_writes_a_row_per_contender(tmp_path, name, layer_bytes):
    size = ["--layers", "1", "--vocab", "1024", "--output-tokens", "4"]
    done = run("--rounds", "2", *size, "--only", name, "--json", str(tmp_path / "peers.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "peers.json").read_text())
    assert list(found) == ["machine", "kernel", "threads", "versions", "rows"]
    (row,) = found["rows"]
    assert list(row) == KEYS
    assert row["name"] == name
    assert len(row["runs"]) == 2
    weights = 2048 * 1536 + 1536 * 1536 + 17920 * 1536 + 1536 * 8960
    expected = layer_bytes * weights + 0.53 * 1024 * 1536  # scales in fp32
    assert row["weight_bytes"] == pytest.approx(expected, rel=0.03)
    assert f"| {name} | " in done.stdout


def test_an_unknown_contender_is_refused():
    done = run("--only", "linears, 51 % + int4")
    assert done.returncode == 2
    assert "--only 'linears, 51 % + int4': known are llama.cpp Q4_0, " in done.stderr


def test_a_folder_that_does_not_exist_is_refused_before_anything_runs(tmp_path):
    done = run("--only", "linears, dense int4, head int4", "--json", str(tmp_path / "none" / "peers.json"))
    assert done.returncode == 2
    assert "its folder does not exist; make it first" in done.stderr


@pytest.mark.parametrize(
    ("name", "package"), [("torchao linears, int4, head int4", "torchao"), ("llama.cpp Q4_0", "gguf")]
)
def test_alone_and_not_installed_nothing_is_measured(tmp_path, name, package):
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    done = run("--rounds", "1", "--only", name, "--json", str(tmp_path / "peers.json"))
    assert done.returncode == 1
    (row,) = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert row["failed"].startswith("not installed: ")
    assert row["runs"] == []


def test_words_of_3_bits_are_those_of_a_checkpoint(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import random_model

    weight = torch.randn(7, 128)
    values, _ = random_model.rounded_groups(weight, 3)
    assert (int(values.min()), int(values.max())) == (-3, 3)
    assert torch.equal(unpack_words(random_model.pack_three(values), 3, 128), values)


def test_torchao_multiplies_its_codes(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torchao_linears

    nbytes, milliseconds = torchao_linears.decode_step([(256, 512), (512, 256)], 128, 4)  # checks each product
    assert nbytes == 2 * (256 * 512 // 2 + 256 * 512 // 128 * 4)
    assert milliseconds > 0
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight: torch.zeros(1, weight.shape[0]))
    with pytest.raises(RuntimeError, match=r"torchao: a product \[256, 512\] differs by"):
        torchao_linears.decode_step([(256, 512)], 128, 4)


@pytest.mark.parametrize(
    ("suffix", "options", "environment"),
    [
        ("", [], {}),
        (", one process", ["--distributed-executor-backend", "uni"], {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}),
        (
            ", one process, step in C++",
            ["--distributed-executor-backend", "uni", "--compilation-config"],
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_LAYERNAME": "0"},
        ),
    ],
)
def test_the_suffix_of_a_served_contender_sets_its_options(tables, monkeypatch, tmp_path, suffix, options, environment):
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
    monkeypatch.setitem(sys.modules, "random_model", SimpleNamespace(save_model=lambda *_, **__: None))
    args = SimpleNamespace(keep=tmp_path, layers=1, vocab=16, prompt_tokens=1, output_tokens=1)
    name = f"served, 50 % + int4, head int4{suffix}"
    peer_contenders.served(name, args)
    ((found, variables),) = seen
    assert [option for option in found if option in {*options, "uni", "--compilation-config"}] == options
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
        unfinished = SimpleNamespace(add_request=add_request, step=step, has_unfinished_requests=lambda: left[0] > 0)
        return SimpleNamespace(llm_engine=unfinished)

    def sampling(max_tokens, **_):
        asked["tokens"] = max_tokens

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=made, SamplingParams=sampling))
    monkeypatch.setitem(sys.modules, "random_model", SimpleNamespace(save_model=lambda *_, **__: None))
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
    assert engine.asked["options"]["quantization"] == "rac-sparse"


def test_dense_codes_that_vllms_own_method_ran_are_no_contender_of_ours(engine):
    engine.asked["warns"] = ["--quantization rac-sparse has no effect on this model here; leave it out"]
    with pytest.raises(SystemExit, match="vLLM's own method ran it"):
        engine.run("in Python, dense int4, ours, head int4")
