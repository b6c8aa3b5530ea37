"""Progress bars are for a terminal: in a file there is none."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.tiny import entry, recipe

PACKAGE = Path(__file__).parents[2] / "rac_modifier"


def bars() -> list[tuple[str, ast.Call]]:
    """Every progress bar that the package makes."""
    return [
        (f"{path.relative_to(PACKAGE)}:{node.lineno}", node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tqdm"
    ]


def test_no_bar_is_forced_on():
    """tqdm shows a bar everywhere unless `disable` is None, or a variable or expression that can be
    None."""
    shown = bars()
    assert shown
    for where, call in shown:
        given = [keyword.value for keyword in call.keywords if keyword.arg == "disable"]
        assert given, f"{where}: no disable=None"
        nodes = [node for value in given for node in ast.walk(value)]
        may_be_none = any(isinstance(node, ast.Constant) and node.value is None for node in nodes)
        assert may_be_none or isinstance(given[0], ast.Name), f"{where}: shown in a pipe too"


def test_collecting_traces_shows_none_in_a_file(tiny_folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe(entry(tmp_path / "traces.jsonl")))
    words = ["traces", "collect", str(tiny_folder), "-r", "recipe.yaml"]
    words += ["-s", "calibration.tokens=300"]
    # a new process: libraries read when they are imported whether to show bars
    command = [sys.executable, "-m", "rac_modifier.cli", *words]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "%|" not in process.stderr
