"""lighteval on the packed reasoner has the accuracy of rac eval (`make lighteval` installs it)."""

import json
import os
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import rac_modifier
from rac_modifier.evaluation.accuracy import evaluate
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings

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


def test_the_problems_are_those_of_rac_eval(tmp_path, monkeypatch):
    names = write(tmp_path, 5, monkeypatch)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert rows == [
        {"question": p.question, "answer": p.answer} for p in held_out_problems("arithmetic", 5, 0)
    ]
    assert names["last_box"]("\\boxed{3} so </think> \\boxed{ 17 }.") == "17"
    assert names["last_box"]("17") == ""


@pytest.mark.slow
@needs_lighteval
def test_in_its_process_the_accuracy_is_that_of_rac_eval(packed_reasoner, tmp_path, monkeypatch):
    here = evaluate(
        AutoModelForCausalLM.from_pretrained(packed_reasoner, dtype="float32"),
        AutoTokenizer.from_pretrained(packed_reasoner),
        held_out_problems("arithmetic", COUNT, 0),
        label="here",
        source=ProblemSource(source="arithmetic"),
        sampling=SamplingSettings(temperature=0, max_new_tokens=512),
        path=tmp_path / "a.jsonl",
    )
    assert here.accuracy >= 0.5

    write(tmp_path / "problems", COUNT, monkeypatch)
    model = f"model_name={packed_reasoner},dtype=float32,batch_size={COUNT},max_length=1024"
    generation = "generation_parameters={temperature:0,max_new_tokens:512}"
    command = [
        str(Path(str(LIGHTEVAL)).with_name("python")), "-m", "rac_modifier", "lighteval",
        "accelerate", f"{model},{generation}", "rac_arithmetic|0", "--custom-tasks", str(EXAMPLE),
        "--output-dir", str(tmp_path / "out"),
    ]  # fmt: skip
    package = str(Path(rac_modifier.__file__).parents[1])
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "RAC_PROBLEMS": str(tmp_path / "problems"),
        "HOME": str(tmp_path),  # lighteval keeps answers there
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-3000:] + process.stdout[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(results.read_text())["results"]["rac_arithmetic|0"]["boxed"]
    assert accuracy == pytest.approx(here.accuracy)
