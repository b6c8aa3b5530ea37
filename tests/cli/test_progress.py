"""Progress bars are for a terminal: in a file there is none."""

import subprocess
import sys

from tests.tiny import entry, recipe


def test_collecting_traces_shows_none_in_a_file(tiny_folder, tmp_path):
    (tmp_path / "recipe.yaml").write_text(recipe(entry(tmp_path / "traces.jsonl")))
    words = ["traces", "collect", str(tiny_folder), "-r", "recipe.yaml"]
    words += ["-s", "calibration.tokens=300"]
    # a new process: libraries read when they are imported whether to show bars
    command = [sys.executable, "-m", "rac_modifier.cli", *words]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "%|" not in process.stderr
