"""Ctrl-C: one line, no traceback, exit code 130, and the next run goes on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rac_modifier import cli
from rac_modifier.checkpoint.packing import unpack_model
from rac_modifier.traces.store import TraceStore
from tests.cli import stopped_child
from tests.cli.conftest import Rac
from tests.cli.recover_options import OPTIONS
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
        (
            ["eval", "MODEL", "MODEL", "--divergence"],
            "evaluation.teacher_forcing.sample_sequences",
            "nothing is kept; run the same command again",
        ),
        (
            ["unpack", "MODEL", "out"],
            "checkpoint.output_folder.local_folder",
            "nothing is written; run the same",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_command_ends_in_one_line(
    rac: Rac,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    where: str,
    line: str,
) -> None:
    monkeypatch.setattr(f"rac_modifier.{where}", interrupt)
    code, _, error = rac(*(tiny_folder if word == "MODEL" else word for word in words))
    assert only_line(code, error).startswith(line)


def ctrl_c(pid: int, ready: Path, ended: Callable[[], bool]) -> None:
    """Press Ctrl-C as soon as the file `ready` holds several lines."""
    while not ready.exists() or ready.read_bytes().count(b"\n") < 3:
        assert not ended()
        time.sleep(0.05)
    os.killpg(pid, signal.SIGINT)  # to the whole group, as a terminal does


def interrupted(
    command: list[str], folder: Path, ready: Path, stop_at: str = ""
) -> tuple[int, str]:
    """Start a command in a fork and interrupt it when it is `ready`: exit code, standard error."""
    errors = folder / "errors.txt"
    errors.unlink(missing_ok=True)
    process = start(
        stopped_child.main if stop_at else cli.main, command, folder, errors, {"STOP_AT": stop_at}
    )
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


def stopped_at(place: str, words: list[str], folder: Path) -> str:
    """Press Ctrl-C when a file whose path ends in `place` is written; the line."""
    ready = folder / "stopped"
    code, error = interrupted(words, folder, ready, place)
    ready.unlink()
    return only_line(code, error)


def same_tensors(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_ctrl_c_while_traces_are_sampled(
    rac: Rac, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    code, _, error = rac(*words, "-s", "calibration.tokens=300")
    assert code == 0, error
    assert [trace.id for trace in TraceStore.read(store)][: len(held)] == held


@pytest.fixture(scope="module")
def dense_folder(sparse_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model pruned to 2:4, stored dense."""
    folder = tmp_path_factory.mktemp("dense") / "model"
    unpack_model(sparse_folder, folder)
    return folder


@pytest.mark.slow
def test_ctrl_c_while_a_model_is_packed_leaves_no_config(
    rac: Rac,
    sparse_folder: Path,
    dense_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["pack", str(dense_folder), "out"]
    said = stopped_at("out/.rac_saving/rac_run.json", words, tmp_path)
    assert said == "nothing is written; run the same command again"
    assert not Path("out").exists()
    said = stopped_at("out/model.safetensors", words, tmp_path)
    assert said == "out is not complete: remove it, and run the same command again"
    assert not Path("out/config.json").exists()
    shutil.rmtree("out")
    assert rac(*words)[0] == 0
    assert same_tensors(Path("out"), sparse_folder)


@pytest.mark.slow
def test_ctrl_c_while_answers_are_sampled(
    rac: Rac, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    words = [
        "eval",
        str(tiny_folder),
        "--answers",
        "a.jsonl",
        "--cap",
        "8",
        "--batch-size",
        "2",
        "--problems",
    ]
    said = only_line(*interrupted([*words, "2000"], tmp_path, tmp_path / "a.jsonl"))
    assert said == "the answers so far are kept; run the same command again to go on"
    held = Path("a.jsonl").read_bytes()
    code, _, error = rac(*words, 8)
    assert code == 0, error
    assert Path("a.jsonl").read_bytes().startswith(held)


@pytest.mark.slow
def test_ctrl_c_during_recovery(
    rac: Rac,
    tiny_folder: Path,
    sparse_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In training and while the result is saved: the same command goes on, and ends as an
    undisturbed run."""
    steps: list[int] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda *args, **options: (steps.append(1), step(*args, **options))[1],
    )
    words = ["recover", str(tiny_folder), str(sparse_folder), "out", *OPTIONS]
    kept = (
        "the traces, and training up to its last state, are kept and will be used; run the same "
        "command again"
    )

    monkeypatch.chdir(tmp_path)
    assert stopped_at("recovery.safetensors", words, tmp_path) == kept
    assert not Path("out").exists()
    said = stopped_at("out/.rac_saving/.rac_saving/config.json", words, tmp_path)
    assert said == f"out is not complete: remove it. Then, {kept}"
    assert not Path("out/config.json").exists()
    assert list(Path("rac_recovery").glob("*/recovery.safetensors"))
    shutil.rmtree("out")
    assert rac(*words)[0] == 0
    resumed = len(steps)
    assert not Path("rac_recovery").exists()

    (tmp_path / "undisturbed").mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    assert rac(*words)[0] == 0
    assert resumed < len(steps) - resumed
    assert same_tensors(tmp_path / "out", Path("out"))
