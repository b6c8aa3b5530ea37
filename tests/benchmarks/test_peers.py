"""peers.py runs each contender in a process of its own, and one that fails does not end the run; its command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from rac_modifier.kernels.cpu.support import support
from tests.benchmarks.conftest import BENCHMARKS, KEYS


def test_one_that_fails_does_not_end_the_run(tables, peers, monkeypatch):
    """It is not started again; what ran before counts, and rows are saved after each round."""
    started, saved = [], []
    good, bad = "linears, dense int4, head int4", "linears, dense int3, head int4"

    def run(name, args):
        started.append(name)
        return (
            "Broken: why"
            if name == bad and started.count(bad) == 2
            else tables.Figures(10, float(len(started)))
        )

    monkeypatch.setattr(peers, "run", run)
    rows, failed = peers.measure(
        ["llama.cpp Q4_0", bad, good], SimpleNamespace(rounds=3), {}, saved.append
    )
    assert failed
    assert started == [bad, good, good, bad, good]
    assert [len(each) for each in saved] == [3, 3, 3]
    assert [[len(row["runs"]) for row in each] for each in saved] == [
        [0, 1, 1],
        [0, 1, 2],
        [0, 1, 3],
    ]
    assert rows == saved[-1]
    assert [row["failed"] for row in rows] == [
        "not installed: gguf",
        "failed in round 2: Broken: why",
        None,
    ]
    assert [run["round"] for run in rows[2]["runs"]] == [1, 2, 3]
    assert (rows[1]["ms_per_token"], rows[2]["ms_per_token"]) == (1.0, 3.0)
    assert (
        peers.measure(["llama.cpp Q4_0", good], SimpleNamespace(rounds=1), {}, saved.append)[1]
        is False
    )


@pytest.mark.parametrize(
    "error", [SystemExit("too few tokens"), ValueError("too few tokens"), SystemExit(1)], ids=repr
)
def test_a_process_that_fails_says_why(peers, monkeypatch, capsys, error):
    def fails(name, args):
        raise error

    monkeypatch.setattr(peers, "one", fails)
    if error.args == (1,):  # of a signal
        with pytest.raises(SystemExit):
            peers.answer_of("a", None)
        return
    assert peers.answer_of("a", None) == {"failed": f"{type(error).__name__}: too few tokens"}
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "written", "reason"),
    [
        (-11, "", "its process ended with -11"),
        (0, "", "its process wrote no figures: ''"),
        (0, "late words\n", "its process wrote no figures: 'late words"),
        (0, 'words\n{"failed": "ValueError: x"}\n', "ValueError: x"),
        (0, '{"weight_bytes": 1, "ms_per_token": 2.0}\n', None),
    ],
)
def test_what_a_process_leaves(tables, peers, monkeypatch, tmp_path, code, written, reason):
    sizes = dict.fromkeys(("layers", "vocab", "prompt_tokens", "output_tokens", "threads"), 4)
    monkeypatch.setattr(
        peers.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, code, written),
    )
    found = peers.run("a", SimpleNamespace(keep=tmp_path, **sizes))
    assert found == tables.Figures(1, 2.0) if reason is None else found.startswith(reason)


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(BENCHMARKS / "peers.py"), "--threads", "1", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(support().isa is None, reason=support().reason)
@pytest.mark.parametrize(
    ("name", "layer_bytes"),
    [("linears, 50 % + int4, head int4", 0.41), ("linears, dense int3, head int4", 0.44)],
)
def test_the_command_writes_a_row_per_contender(tmp_path, name, layer_bytes):
    size = ["--layers", "1", "--vocab", "1024", "--output-tokens", "4"]
    done = run("--rounds", "2", *size, "--only", name, "--json", str(tmp_path / "peers.json"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "peers.json").read_text())
    assert list(found) == ["machine", "kernel", "threads", "versions", "rows"]
    (row,) = found["rows"]
    assert list(row) == KEYS
    assert row["name"] == name
    assert len(row["runs"]) == 2
    weights = 2048 * 1536 + 1536 * 1536 + 17920 * 1536 + 1536 * 8960
    expected = layer_bytes * weights + 0.53 * 1024 * 1536  # scales in fp32
    assert row["weight_bytes"] == pytest.approx(expected, rel=0.03)
    assert f"| {name} | " in done.stdout


def test_an_unknown_contender_is_refused():
    done = run("--only", "linears, 51 % + int4")
    assert done.returncode == 2
    assert "--only 'linears, 51 % + int4': known are llama.cpp Q4_0, " in done.stderr


def test_a_folder_that_does_not_exist_is_refused_before_anything_runs(tmp_path):
    done = run(
        "--only", "linears, dense int4, head int4", "--json", str(tmp_path / "none" / "peers.json")
    )
    assert done.returncode == 2
    assert "its folder does not exist; make it first" in done.stderr


@pytest.mark.parametrize(
    ("name", "package"),
    [("torchao linears, int4, head int4", "torchao"), ("llama.cpp Q4_0", "gguf")],
)
def test_alone_and_not_installed_nothing_is_measured(tmp_path, name, package):
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    done = run("--rounds", "1", "--only", name, "--json", str(tmp_path / "peers.json"))
    assert done.returncode == 1
    (row,) = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert row["failed"].startswith("not installed: ")
    assert row["runs"] == []
