"""lighteval on the embedded reasoner pruned to 2:4 and packed, in its process and through `vllm serve`: the accuracy of rac eval.

It is run where RAC_LIGHTEVAL names the command; `make lighteval` installs it and runs this file.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import rac_modifier
from rac_modifier.checkpoint.pack_plan import plan_packing
from rac_modifier.checkpoint.packing import pack_model
from rac_modifier.evaluation import lighteval
from rac_modifier.evaluation.accuracy import evaluate
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.reasoner import reasoner_path
from tests.tiny import linears
from tests.vllm_server import VLLM, served

LIGHTEVAL = os.environ.get("RAC_LIGHTEVAL") or shutil.which("lighteval")
EXAMPLE = Path(__file__).parents[2] / "examples" / "lighteval" / "arithmetic.py"
COUNT = 8
needs_lighteval = pytest.mark.skipif(
    LIGHTEVAL is None, reason="no `lighteval` on the PATH; name one with RAC_LIGHTEVAL"
)


def write(folder: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the example as a script; returns its names."""
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), str(folder), str(count)])
    return runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_the_problems_are_those_of_rac_eval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write(tmp_path, 5, monkeypatch)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert rows == [
        {"question": p.question, "answer": p.answer} for p in held_out_problems("arithmetic", 5, 0)
    ]
    assert names["last_box"]("\\boxed{3} so </think> \\boxed{ 17 }.") == "17"
    assert names["last_box"]("17") == ""


def test_without_lighteval_the_next_step_is_said(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "lighteval.__main__", None)
    with pytest.raises(SystemExit) as stopped:
        lighteval.main()
    assert stopped.value.code == 1
    assert "lighteval" in (said := capsys.readouterr().err)
    assert "is not installed; lighteval needs an environment of its own (`make lighteval`" in said


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reasoner with one of the two smallest of each four weights of `up` set to 0, packed; it still reasons."""
    folder = tmp_path_factory.mktemp("models")
    model = AutoModelForCausalLM.from_pretrained(reasoner_path(), dtype="float32")
    for name, linear in linears(model).items():
        if name.endswith("up_proj"):
            blocks = linear.weight.data.view(-1, 4)
            blocks.scatter_(1, blocks.abs().topk(2, largest=False).indices, 0)
    model.save_pretrained(folder / "dense")
    AutoTokenizer.from_pretrained(reasoner_path()).save_pretrained(folder / "dense")
    pack_model(plan_packing(folder / "dense"), folder / "packed", "dense")
    return folder / "packed"


@pytest.fixture(scope="module")
def accuracy(packed: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(packed, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(packed)
    found = evaluate(
        model,
        tokenizer,
        held_out_problems("arithmetic", COUNT, 0),
        label="here",
        max_new_tokens=512,
    )
    assert found.accuracy >= 0.5
    return found.accuracy


def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *command: str) -> float:
    """lighteval's accuracy; `command` up to its task."""
    write(tmp_path / "problems", COUNT, monkeypatch)
    paths = os.pathsep.join(
        filter(None, [str(Path(rac_modifier.__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    # lighteval keeps answers under HOME
    places = {
        "RAC_PROBLEMS": str(tmp_path / "problems"),
        "HOME": str(tmp_path),
        "PYTHONPATH": paths,
    }
    where = (
        "rac_arithmetic|0",
        "--custom-tasks",
        str(EXAMPLE),
        "--output-dir",
        str(tmp_path / "out"),
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **places}
    done = subprocess.run(
        [*command, *where], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    return json.loads(results.read_text())["results"]["rac_arithmetic|0"]["boxed"]


@pytest.mark.slow
@needs_lighteval
def test_in_its_process_the_accuracy_is_that_of_rac_eval(
    packed, accuracy, tmp_path, monkeypatch
) -> None:
    model = f"model_name={packed},dtype=float32,batch_size={COUNT},max_length=1024"
    generation = "generation_parameters={temperature:0,max_new_tokens:512}"
    python = str(Path(str(LIGHTEVAL)).with_name("python"))
    command = (
        python,
        "-m",
        "rac_modifier.evaluation.lighteval",
        "accelerate",
        f"{model},{generation}",
    )
    assert asked(tmp_path, monkeypatch, *command) == pytest.approx(accuracy)


@pytest.mark.slow
@pytest.mark.skipif(VLLM is None, reason="no `vllm` on the PATH; name one with RAC_VLLM")
@needs_lighteval
def test_served_the_accuracy_is_that_of_rac_eval(packed, accuracy, tmp_path, monkeypatch) -> None:
    with served(packed, tmp_path / "log", "--served-model-name", "reasoner") as url:
        model = {
            "model_name": "openai/reasoner",
            "base_url": f"{url}/v1",
            "api_key": "none",
            "max_model_length": 1024,
        }
        model["generation_parameters"] = "{temperature:0,max_new_tokens:512}"
        arguments = ",".join(f"{key}={value}" for key, value in model.items())
        assert asked(
            tmp_path, monkeypatch, str(LIGHTEVAL), "endpoint", "litellm", arguments
        ) == pytest.approx(accuracy)
