"""Ctrl-C: one line, no traceback, exit code 130, and the next run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from rac_modifier.cli.interrupt import resumable
from rac_modifier.traces.store import TraceStore
from tests.tiny import entry, recipe


def test_an_interruption_is_one_line_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, resumable(lambda: "run it again"):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err.strip() == "interrupted: run it again"


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError), resumable("run it again"):
        raise ZeroDivisionError


# A job in the background of a script, such as a CI run, inherits an ignored SIGINT: Python then raises no KeyboardInterrupt.
RAC = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from rac_modifier.cli import main
main()
"""


def interrupted(command: list[str], folder: Path, ready: Path) -> tuple[int, str]:
    """Start a command, press Ctrl-C as soon as the file `ready` holds several lines: exit code, standard error."""
    process = subprocess.Popen(
        [sys.executable, "-c", RAC, *command], cwd=folder, stderr=subprocess.PIPE, text=True,
        stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not ready.exists() or ready.read_bytes().count(b"\n") < 3:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # to the whole group, as a terminal does
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
        return process.returncode, error
    finally:  # a test that fails leaves no process behind
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["collect", "prune"])
def test_ctrl_c_while_traces_are_sampled(tiny_folder: Path, tmp_path: Path, command: str) -> None:
    """The traces so far are in the store; the same command, with a smaller budget, ends from there."""
    store = tmp_path / "traces.jsonl"
    settings = entry(store)
    settings["calibration"]["tokens"] = 10**7
    (tmp_path / "recipe.yaml").write_text(recipe(settings))
    out = tmp_path / "out"
    words = ["traces", "collect", str(tiny_folder)] if command == "collect" else ["prune", str(tiny_folder), str(out)]
    words += ["-r", "recipe.yaml"]
    code, error = interrupted(words, tmp_path, store)
    assert code == 130, error
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("interrupted: ")]
    assert len(lines) == 1, error
    assert "run the same command again" in lines[0]
    assert error.rstrip().endswith(lines[0])
    assert not out.exists()
    held = [trace.id for trace in TraceStore.read(store)]
    assert held
    again = [*words, "-s", "calibration.tokens=300"]
    done = subprocess.run(
        [sys.executable, "-m", "rac_modifier.cli", *again], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [trace.id for trace in TraceStore.read(store)][: len(held)] == held
