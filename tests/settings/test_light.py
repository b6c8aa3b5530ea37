"""Settings are checked at once: what importing them loads, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path.stem
    for path in (ROOT / "rac_modifier" / "settings").glob("*.py")
    if path.stem != "__init__"
)
HEAVY = [
    "torch",
    "transformers",
    "compressed_tensors",
    "llmcompressor",
    "numpy",
    "datasets",
    "tokenizers",
    "vllm",
]


def heavy_after(code: str) -> list[str]:
    program = f"import json, sys\n{code}\nprint()\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def test_every_module_of_settings_loads_nothing_heavy():
    assert len(MODULES) > 9
    assert heavy_after("\n".join(f"import rac_modifier.settings.{name}" for name in MODULES)) == []


@pytest.mark.parametrize(
    "args", [["schema"], ["prune", "--check", "rac_2of4", "-s", "sparsity=null"]], ids=str
)
def test_a_recipe_is_checked_and_the_schema_printed_without_anything_heavy(args):
    code = f"from rac_modifier.cli import app\napp({args!r}, standalone_mode=False)"
    assert heavy_after(code) == []
