"""Stock lm-eval asks `vllm serve` about a packed checkpoint, where there is a vLLM: the answers are
those of transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.vllm_server import NEEDS_SERVER, served

pytestmark = NEEDS_SERVER
ROOT = Path(__file__).parents[2]
COUNT = 8


def run(module: str, arguments: dict[str, Any], kind: str, out: Path) -> tuple[float, list[str]]:
    """Accuracy, and the answer to each problem that the regular expression found."""
    command = [
        sys.executable, "-m", *module.split(), "run", "--model", kind, "--apply_chat_template",
        "--batch_size", str(COUNT),
        "--model_args", ",".join(f"{key}={value}" for key, value in arguments.items()), "--device",
        "cpu",
        "--include_path", "examples/lm_eval", "--tasks", "rac_arithmetic", "--metadata",
        f'{{"count": {COUNT}}}',
        "--output_path", str(out), "--log_samples",
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    (results,), (samples,) = (
        list(out.rglob(f"{name}*.json*")) for name in ("results_", "samples_")
    )
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    accuracy = json.loads(results.read_text())["results"]["rac_arithmetic"]["exact_match,boxed"]
    return accuracy, [row["filtered_resps"][0] for row in rows]


def test_served_answers_are_those_of_transformers(packed_reasoner, tmp_path):
    packed = packed_reasoner
    with served(packed, tmp_path / "log", "--reasoning-parser", "deepseek_r1") as url:
        there = {
            "model": packed,
            "tokenizer": packed,
            "base_url": f"{url}/v1/completions",
            "num_concurrent": COUNT,
        }
        there |= {"tokenizer_backend": "huggingface", "max_length": 1024}
        accuracy, answers = run("lm_eval", there, "local-completions", tmp_path / "served")
        chat = {"model": packed, "base_url": f"{url}/v1/chat/completions", "num_concurrent": COUNT}
        of_chat = run("lm_eval", chat, "local-chat-completions", tmp_path / "chat")
        assert of_chat == (accuracy, answers)
        (samples,) = (tmp_path / "chat").rglob("samples_*.json*")
        for row in map(json.loads, samples.read_text().splitlines()):
            assert "think>" not in row["resps"][0][0]  # the parser has taken the thinking out
    assert "sparse kernel" in (tmp_path / "log").read_text()
    here = {"pretrained": packed, "dtype": "float32", "think_end_token": "</think>"}
    assert run("rac_modifier lm_eval", here, "hf", tmp_path / "here") == (
        accuracy,
        answers,
    )
    assert accuracy >= 0.5  # it still reasons
