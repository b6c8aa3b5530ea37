"""Smoke tests of bench/: the suites import, the tables of docs/ are those of results/, random
models are what their forms say."""

import argparse
import ast
import asyncio
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from aiohttp import web
from aiohttp.test_utils import TestServer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bench import experts, server, serving, soak
from bench.__main__ import SUITES, main
from bench.formats import FORMATS
from bench.gguf_file import type_of
from bench.grid import CALIBRATIONS, OURS, VARIANTS, calibrated_on, pattern
from bench.models import reasoner, smollm2
from bench.render import table
from bench.runtimes import listed_kl
from bench.shapes import Form, random_mask, random_model
from bench.stopping import is_detected
from rac_modifier.reasoner import reasoner_path
from rac_modifier.settings.grid import Grid, plan_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_options_and_a_tiny_mode(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--tiny", "--help"])  # the options of the tiny mode are parsed before the help
    assert stop.value.code == 0
    assert "--tiny" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("length", "copies", "detected"), [(8, 3, True), (8, 2, False), (7, 3, False), (129, 3, False)]
)
def test_copies_of_a_pattern_are_detected(length, copies, detected):
    answer = [500, 501, *(list(range(length)) * copies), 502]
    assert is_detected(tuple(answer)) == detected


def test_the_kl_of_listed_tokens_is_that_with_the_others_as_one():
    torch.manual_seed(0)
    p, q = torch.randn(2, 50, dtype=torch.float64).softmax(-1)
    listed = q.argsort(descending=True)[:20]
    rest = torch.ones(50, dtype=torch.bool)
    rest[listed] = False
    of_p, of_q = (torch.cat([x[~rest], x[rest].sum()[None]]) for x in (p, q))
    expected = (of_p * (of_p / of_q).log()).sum()
    served = {int(token): float(q[token].log()) for token in listed}
    assert listed_kl(p.log(), served) == pytest.approx(float(expected))
    full = {token: float(q[token].log()) for token in range(50)}
    assert listed_kl(p.log(), full) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)


def test_what_a_suite_imports_late_exists():
    for path in (ROOT / "bench").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rac_modifier"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    assert hasattr(module, alias.name) or importlib.import_module(name), path


def test_the_tables_of_the_docs_are_those_of_results():
    """If this fails: make results."""
    command = [sys.executable, "-m", "bench.render", "--check"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


def test_every_result_names_its_measurement_and_is_shown():
    pages = "".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    for path in (ROOT / "results").glob("*.json"):
        result = json.loads(path.read_text())
        if "columns" not in result:  # offgrid.json is a report
            continue
        assert {"model", "machine", "date", "commit", "command"} <= result.keys(), path.name
        assert all(len(row) == len(result["columns"]) for row in result["rows"]), path.name
        assert re.search(rf"<!-- table {path.stem}( without .+)? -->|results/{path.name}", pages)


def test_rows_of_the_grids_are_settings_that_exist(tmp_path):
    rows, small = [], reasoner(tmp_path)
    for (name, entry), kind in itertools.product(VARIANTS.items(), CALIBRATIONS):
        row = {"label": f"{name}, {kind}", "recipe": {OURS: {**pattern("2:4"), **entry}}}
        rows.append(row | {"set": calibrated_on(kind, small)})
    formats = yaml.safe_load(FORMATS.read_text())["rows"]
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").touch()  # the model is there
    chat = smollm2(tmp_path)
    options = argparse.ArgumentParser()
    experts.add_options(options)
    mixture = experts.planned(options.parse_args([]), small)
    for subject, its_rows in ((small, rows), (chat, formats), (small, mixture)):
        calibration = {**subject.shared.get("calibration", {}), "tokens": 512}
        shared = {**subject.shared, "calibration": calibration}
        grid = {"shared": shared, "evaluation": subject.evaluation, "rows": its_rows}
        assert len(plan_rows(Grid.model_validate(grid), "bench")) == len(its_rows)


def test_a_random_model_has_the_form_that_was_asked_for(tmp_path):
    mask = random_mask(8, 64, "2:4").view(8, 16, 4)
    assert torch.equal(mask.sum(-1), torch.full((8, 16), 2))
    folder = random_model(tmp_path, Form.parse("int4"), 1, 64)
    words = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight_packed"]
    assert words.shape == (8960, 1536 * 4 // 32)
    codes = torch.stack([words >> 4 * at & 15 for at in range(8)], dim=-1)
    assert set(codes.unique().tolist()) == {*range(1, 16)}  # symmetric: -7 to 7, plus 8


def test_the_mixture_is_the_dense_model_where_a_token_meets_every_quarter():
    dense = AutoModelForCausalLM.from_pretrained(reasoner_path(), dtype=torch.float32).eval()
    model = experts.with_experts(dense).eval()
    ids = torch.arange(4, 24)[None]
    chosen = torch.tensor([[0, 5, 10, 15]]).expand(ids.numel(), 4)  # of each quarter a copy
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda _module, _inputs, output: (output[0], torch.full_like(output[1], 0.25), chosen)
        )
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)


SERVER = """
import http.server, json, os, sys, threading

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        if FAULT == "crash":
            print("[core.py:1] AttributeError: no cpu_gemm", flush=True)
            os._exit(1)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if FAULT == "hang":
            threading.Event().wait()
        self.send_response(200)
        self.end_headers()
        for token in range(body["max_tokens"] - (FAULT == "short")):
            line = json.dumps({"choices": [CHOICE]})
            self.wfile.write(f"data: {line}\\n\\n".encode())

if FAULT == "refuse":
    sys.exit("ValueError: no such model")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


def test_a_contender_that_is_missing_refuses_or_crashes_is_a_named_gap(tmp_path, monkeypatch):
    tokens, text = {"token_ids": [7]}, {"text": "t7"}  # vLLM's answers and llama.cpp's
    servers = {"refuse": tokens, "crash": tokens, "short": text, "int4": tokens, "Q4_0": text}

    def prepare(name, options):
        lines = f"FAULT, CHOICE = {name!r}, {servers[name]!r}\n{SERVER}"
        log = tmp_path / f"{name}.log"
        return tmp_path, serving.running([sys.executable, "-c", lines], log, dict(os.environ))

    monkeypatch.setattr(serving, "prepare", prepare)
    monkeypatch.setattr(serving, "split", lambda name: ("", name))
    options = ["--concurrency", "1", "2", "--output-tokens", "3", "--prompts", "8"]
    main(["serving", "--rounds", "2", "--out", str(tmp_path), "--forms", *servers, *options])
    result = json.loads((tmp_path / "serving.json").read_text())
    assert [row[0] for row in result["rows"]] == ["int4", "Q4_0", "refuse", "crash", "short"]
    columns = list(result["columns"])
    for row in result["rows"]:
        speeds = [row[columns.index(f"tokens/s, {count} at a time")] for count in (1, 2)]
        assert all(speeds) == (row[0] in ("int4", "Q4_0"))
    reasons = result["gaps"]
    assert "no such model" in reasons["refuse"]
    assert "no cpu_gemm" in reasons["crash"]
    assert "asked for 8 tokens, got 7" in reasons["short"]
    assert f"- refuse: {reasons['refuse']}" in table(result)


def test_a_contender_that_never_answers_is_a_named_gap(tmp_path, monkeypatch):
    lines = f"FAULT, CHOICE = 'hang', None\n{SERVER}"
    command, log = [sys.executable, "-c", lines], tmp_path / "hang.log"
    context = serving.running(command, log, dict(os.environ))
    monkeypatch.setattr(serving, "prepare", lambda name, options: (tmp_path, context))
    monkeypatch.setattr(server, "SILENT_SECONDS", 0.1)
    main(["serving", "--rounds", "1", "--out", str(tmp_path), "--forms", "int4"])
    gaps = json.loads((tmp_path / "serving.json").read_text())["gaps"]
    assert "Timeout" in gaps["int4"]


def test_a_project_that_is_not_installed_is_a_gap(tmp_path):
    folders = ["--work", str(tmp_path), "--out", str(tmp_path), "--packages", str(tmp_path)]
    main(["serving", "--tiny", "--forms", "openvino-Q4_0", "zentorch-bf16", *folders])
    gaps = json.loads((tmp_path / "serving.json").read_text())["gaps"]
    assert "No module named" in gaps["openvino-Q4_0"]
    assert "No module named 'zentorch'" in gaps["zentorch-bf16"]


def test_the_types_of_a_gguf_file_are_those_that_llama_cpp_chooses():
    """Counts of a Qwen2-1.5B quantized by llama-quantize: 28 layers, a tied head."""
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    counts = {}
    for kind in ("Q4_0", "Q4_K_M", "Q3_K_M", "IQ2_XXS"):
        types = [type_of(kind, name, layer, 28) for layer in range(28) for name in matrices]
        counts[kind] = dict(Counter(types))
    assert counts["Q4_0"] == {"Q4_0": 196}
    assert counts["Q4_K_M"] == {"Q4_K": 168, "Q6_K": 28}
    assert counts["Q3_K_M"] == {"Q3_K": 112, "Q4_K": 81, "Q5_K": 3}
    assert counts["IQ2_XXS"] == {"IQ2_XXS": 165, "Q4_K": 28, "Q2_K": 3}


@pytest.mark.parametrize("careless", [False, True])
def test_the_soak_names_a_bad_prompt_that_is_answered(monkeypatch, careless):
    async def complete(request):
        body = await request.json()
        prompt = body["prompt"]
        valid = prompt and all(isinstance(at, int) and 0 <= at < 64 for at in prompt)
        if not (valid and len(prompt) < 512) and not (careless and prompt == [-1]):
            raise web.HTTPBadRequest
        if not body["stream"]:
            return web.json_response({"choices": [{"token_ids": [7] * body["max_tokens"]}]})
        lines = "data: {}\n\n" * body["max_tokens"]
        return web.Response(text=lines)

    async def metrics(_):
        return web.Response(text="vllm:num_requests_running{} 0.0\n")

    async def soaked():
        app = web.Application()
        app.add_routes([web.post("/v1/completions", complete), web.get("/metrics", metrics)])
        async with TestServer(app) as fake:
            soaked = SimpleNamespace(url=str(fake.make_url("")), allocated=lambda: 1)
            return await soak.load(soaked, 64, 400)

    monkeypatch.setattr(soak, "PROBE", [10])
    seen = asyncio.run(soaked())
    assert seen.counts["ended"] == 400
    assert len(seen.samples) == 4
    assert len(seen.seconds) > 200
    if careless:
        assert set(seen.wrong) == {"the prompt [-1] got status 200"}
    else:
        assert seen.wrong == []
        assert 5 < seen.counts["refused"] < 40
