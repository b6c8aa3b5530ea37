"""Settings are checked fast: what importing them loads, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "rac_modifier" / "settings"
HEAVY = ["torch", "transformers", "compressed_tensors", "llmcompressor", "numpy", "datasets"]
PROGRAM = """
import importlib, json, sys
from rac_modifier.cli import app
for name in {names!r}:
    importlib.import_module("rac_modifier.settings." + name)
app(["schema"], standalone_mode=False)
app(["recipes", "check", "rac_2of4", "-s", "sparsity=null"], standalone_mode=False)
print()
print(json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""


def test_settings_recipes_and_the_schema_load_nothing_heavy():
    names = [path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__"]
    program = PROGRAM.format(names=names, heavy=HEAVY)
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == []
