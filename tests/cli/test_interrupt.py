"""Ctrl-C: one line, no traceback, exit code 130, and the next run goes on."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rac_modifier import cli
from rac_modifier.recovery.training_loop import TrainingLoop
from rac_modifier.traces.store import TraceStore
from tests.cli import stopped_child
from tests.cli.conftest import OPTIONS
from tests.forked import start
from tests.tiny import entry, recipe


def interrupt(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "where", "line"),
    [
        (["schema"], "settings.recipe.schema", "run the same command again"),
        (
            ["eval", "MODEL"],
            "evaluation.accuracy.evaluate",
            "the answers so far are kept; run the same command again to go on",
        ),
        (["unpack", "MODEL", "out"], "checkpoint.output_folder.local_folder", "nothing is writ"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_command_ends_in_one_line(rac, tiny_folder, monkeypatch, words, where, line):
    monkeypatch.setattr(f"rac_modifier.{where}", interrupt)
    code, _, error = rac(*(tiny_folder if word == "MODEL" else word for word in words))
    assert only_line(code, error).startswith(line)


def ctrl_c(pid: int, ready: Path, ended: Callable[[], bool]) -> None:
    """Press Ctrl-C as soon as the file `ready` holds several lines."""
    while not ready.exists() or ready.read_bytes().count(b"\n") < 3:
        assert not ended()
        time.sleep(0.05)
    os.killpg(pid, signal.SIGINT)  # to the whole group, as a terminal does


def interrupted(command, folder, ready, stop_at=""):
    """Start a command in a fork and interrupt it when it is `ready`: exit code, standard error."""
    errors = folder / "errors.txt"
    errors.unlink(missing_ok=True)
    main = stopped_child.main if stop_at else cli.main
    process = start(main, command, folder, errors, {"STOP_AT": stop_at})
    assert process.pid is not None
    try:
        ctrl_c(process.pid, ready, lambda: not process.is_alive())
        process.join()
        assert process.exitcode is not None
        return process.exitcode, errors.read_text()
    finally:  # a test that fails leaves no process behind
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)


def only_line(code: int, error: str) -> str:
    """What the one line says with which a command has to end."""
    assert code == 130, error
    assert "Traceback" not in error
    assert error.count("interrupted: ") == 1, error
    last = error.rstrip().splitlines()[-1]
    assert last.startswith("interrupted: ")
    return last.removeprefix("interrupted: ")


@pytest.mark.slow
def test_ctrl_c_while_traces_are_sampled(rac, tiny_folder, tmp_path, monkeypatch):
    """The traces so far are in the store; the same command, with a smaller budget, ends from
    there."""
    store, out = tmp_path / "traces.jsonl", tmp_path / "out"
    settings = entry(store)
    settings["calibration"]["tokens"] = 10**6  # more than are sampled before Ctrl-C
    (tmp_path / "recipe.yaml").write_text(recipe(settings))
    words = ["prune", str(tiny_folder), str(out), "-r", "recipe.yaml"]
    assert "run the same command again" in only_line(*interrupted(words, tmp_path, store))
    assert not out.exists()
    held = [trace.id for trace in TraceStore.read(store)]
    assert held
    monkeypatch.chdir(tmp_path)
    rac.output(*words, "-s", "calibration.tokens=300")
    assert [trace.id for trace in TraceStore.read(store)][: len(held)] == held


@pytest.mark.slow
def test_ctrl_c_during_recovery(rac, tiny_folder, sparse_folder, tmp_path, monkeypatch):
    """In training and while the result is saved: the same command goes on."""
    words = ["recover", str(tiny_folder), str(sparse_folder), "out", *OPTIONS]

    def stopped_at(place: str) -> str:
        ready = tmp_path / "stopped"
        line = only_line(*interrupted(words, tmp_path, ready, place))
        ready.unlink()
        return line

    monkeypatch.chdir(tmp_path)
    assert stopped_at("recovery.safetensors").endswith("run the same command again")
    assert not Path("out").exists()
    said = stopped_at("out/.rac_saving/.rac_saving/config.json")
    assert said == "out is not complete: remove it, and run the same command again"
    assert not Path("out/config.json").exists()
    assert list(Path("rac_recovery").glob("*/recovery.safetensors"))
    shutil.rmtree("out")
    monkeypatch.setattr(TrainingLoop, "step", lambda *args: pytest.fail("trained again"))
    assert rac(*words)[0] == 0
    assert not Path("rac_recovery").exists()
