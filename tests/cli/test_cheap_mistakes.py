"""Mistakes in names, folders and columns are answered before torch or transformers is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = {
    "prune reasoner out -r rac_2of5": "did you mean rac_2of4",
    "prune reasoner out -r rac_2of4 -s sparsty=1": "did you mean sparsity?",
    "prune reasoner used -r rac_2of4": "output folder used is in use",
    "prune ./none out -r rac_2of4": "no model at './none' (no such folder)",
    "recover reasoner ./none out": "no model at './none' (no such folder)",
    "recover reasoner ./none out -s tokns=3": "did you mean tokens?",
    "eval ./none": "no model at './none' (no such folder)",
    "eval reasoner reasoner": "a model is named twice",
    "eval reasoner --json none/r.json": "its folder does not exist",
    "frontier reasoner --recipe-grid smal --out o": "name a YAML file, or one of contenders",
    "traces collect reasoner -r rac_2of5": "did you mean rac_2of4",
    "traces inspect none.jsonl": "does not exist",
    "inspect ./none": "no such folder",
    "pack ./none out": "no such folder",
    "unpack ./none out": "no such folder",
    "report none -o r.html": "holds no results",
    "recipes check rac_2of5": "did you mean rac_2of4",
    # last, since files are read by datasets, which imports torch
    "eval reasoner --source p.jsonl --problems 1": "have no answer",
    "eval reasoner --source p.jsonl --column q --problems 1": "'q'",
}
# All in one process, the imports of one case would be seen in the next: none may import any.
SCRIPT = """
import contextlib, io, json, sys
from rac_modifier import cli

def answer(line):
    sys.argv, err = ["rac", *line.split()], io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        cli.main()
    heavy = {"torch", "transformers", "llmcompressor", "vllm", "datasets"} & sys.modules.keys()
    return [" ".join(err.getvalue().split()), sorted(heavy)]

print(json.dumps({line: answer(line) for line in json.loads(sys.argv[1])}))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, list]:
    """The message of each case, and the heavy modules that were loaded until then."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "used").mkdir()
    (folder / "used" / "x").touch()
    (folder / "p.jsonl").write_text('{"problem": "1+1?"}\n')
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(list(CASES))],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", CASES)
def test_the_answer_comes_before_the_heavy_imports(answers, line):
    message, heavy = answers[line]
    assert CASES[line] in message
    assert set(heavy) <= ({"datasets", "torch"} if "--source" in line else set())
