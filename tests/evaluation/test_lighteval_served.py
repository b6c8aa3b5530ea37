"""lighteval, which RAC_LIGHTEVAL names, asks `vllm serve` about the embedded reasoner: its accuracy is that of rac eval."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rac_modifier.evaluation.accuracy import evaluate
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.reasoner import reasoner_path
from tests.vllm_server import VLLM, served

LIGHTEVAL = os.environ.get("RAC_LIGHTEVAL") or shutil.which("lighteval")
EXAMPLE = Path(__file__).parents[2] / "examples" / "lighteval" / "arithmetic.py"
COUNT = 8


def write(folder: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the example as a script; returns its names."""
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), str(folder), str(count)])
    return runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_the_problems_are_those_of_rac_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = write(tmp_path, 5, monkeypatch)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert rows == [{"question": p.question, "answer": p.answer} for p in held_out_problems("arithmetic", 5, 0)]
    assert names["last_box"]("\\boxed{3} so </think> \\boxed{ 17 }.") == "17"
    assert names["last_box"]("17") == ""


@pytest.mark.slow
@pytest.mark.skipif(VLLM is None, reason="no `vllm` on the PATH; name one with RAC_VLLM")
@pytest.mark.skipif(LIGHTEVAL is None, reason="no `lighteval` on the PATH; name one with RAC_LIGHTEVAL")
def test_the_accuracy_is_that_of_rac_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "problems", COUNT, monkeypatch)
    # lighteval keeps answers under HOME
    environment = {
        **os.environ,
        "RAC_PROBLEMS": str(tmp_path / "problems"),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
    }
    with served(reasoner_path(), tmp_path / "log", "--served-model-name", "reasoner") as url:
        model = {"model_name": "openai/reasoner", "base_url": f"{url}/v1", "api_key": "none", "max_model_length": 1024}
        model["generation_parameters"] = "{temperature:0,max_new_tokens:512}"
        command = [
            str(LIGHTEVAL), "endpoint", "litellm", ",".join(f"{key}={value}" for key, value in model.items()),
            "rac_arithmetic|0", "--custom-tasks", str(EXAMPLE), "--output-dir", str(tmp_path / "out"),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["rac_arithmetic|0"]["boxed"]
    dense = AutoModelForCausalLM.from_pretrained(reasoner_path(), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(reasoner_path())
    here = evaluate(dense, tokenizer, held_out_problems("arithmetic", COUNT, 0), label="here", max_new_tokens=512)
    assert found == pytest.approx(here.accuracy)
    assert found >= 0.5
