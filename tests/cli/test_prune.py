import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rac_modifier.checkpoint.hf_quantizer import load_model
from tests.cli import stopped_child
from tests.forked import run
from tests.tiny import entry, is_2of4, linears, recipe

ROOT = Path(__file__).parents[2]


def test_prune_writes_a_checkpoint_and_says_where(rac, tiny_folder, recipe_file, tmp_path):
    out = tmp_path / "sparse"
    words = ("prune", tiny_folder, out, "-r", recipe_file, "-s")
    code, stdout, stderr = rac(*words, "solver=admm")
    assert (code, stdout) == (1, "")
    assert stderr.startswith("error: ")
    assert "'admm'" in stderr
    assert "Traceback" not in stderr
    assert not out.exists()
    stdout = rac.output(*words, "calibration.tokens=500")
    assert f"rac inspect {out}" in stdout
    record = json.loads((out / "rac_run.json").read_text())
    assert record["calibration"]["tokens"] == 500


def test_a_whole_command_is_checked(rac, tiny_folder, recipe_file, tmp_path):
    """With a model and an output folder `--check` reads and writes nothing, and refuses what the
    run would refuse."""
    command = ["prune", tiny_folder, tmp_path / "out", "-r", recipe_file, "--check"]
    stdout = rac.output(*command)
    assert "are fine; run the command without --check" in stdout
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for name, models in {"no-model": ("no-model", "out"), "full": (tiny_folder, "full")}.items():
        code, _, stderr = rac("prune", *models, *command[3:])
        assert code != 0
        assert name in stderr
    code, _, stderr = rac(*command, "-s", "preset=paper", "-s", "iterations=4")
    assert code == 1
    assert "iterations: 4 has no effect with solver: sparsegpt" in stderr


def test_without_a_recipe_the_recommended_one_is_taken_and_said(rac, tiny_folder):
    out = rac.output("prune", tiny_folder, "out", "--check")
    chosen, traces, own, *_, checked = out.splitlines()
    assert chosen.startswith("no --recipe: taking rac_w4a16, ")
    assert "262,144 tokens" in traces
    assert "--set traces.problems.source=FILE" in own
    assert checked.startswith("rac_w4a16, ")


@pytest.mark.parametrize("storage", ["packed", "dense"])
def test_a_packed_checkpoint_is_pruned_again(rac, sparse_folder, tmp_path, storage):
    """llm-compressor copies the source's config.json, which says that the weights are packed."""
    settings = entry(tmp_path / "own.jsonl", storage=storage)
    (tmp_path / "recipe.yaml").write_text(recipe(settings))
    words = ("prune", sparse_folder, "again", "-r", "recipe.yaml", "-s", "calibration.tokens=300")
    rac.output(*words)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert ("quantization_config" in config) == (storage == "packed")
    assert config["rac_sparsity"]["storage"] == storage
    before, after = (load_model(folder) for folder in (sparse_folder, tmp_path / "again"))
    for name, linear in linears(after).items():
        assert is_2of4(linear.weight), name
        assert (linear.weight[before.get_submodule(name).weight == 0] == 0).all()


@pytest.mark.parametrize(
    ("put", "state"),
    [
        ("out/.rac_saving/.rac_saving/config.json", None),
        ("out/.rac_saving/model.safetensors", None),
        ("out/.rac_saving/rac_run.json", None),
        ("out/model.safetensors", "is in use"),
        ("out/config.json", "holds a model"),
    ],
)
def test_a_kill_while_the_result_is_saved(
    rac, tiny_folder, recipe_file, sparse_folder, tmp_path, put, state
):
    """The same command ends with the same bits, or says what is there."""
    words = ["prune", str(tiny_folder), "out", "-r", str(recipe_file), "-s"]
    words += ["calibration.tokens=500"]
    assert run(stopped_child.killed, words, tmp_path, {"KILL_AT": put}).returncode == -9
    assert (tmp_path / "out" / "config.json").exists() == (state == "holds a model")
    if state is not None:
        code, _, said = rac(*words)
        assert (code, state in said) == (1, True), said
        shutil.rmtree("out")
    rac.output(*words)
    saved = (folder / "model.safetensors" for folder in (tmp_path / "out", sparse_folder))
    assert len({path.read_bytes() for path in saved}) == 1
    assert not (tmp_path / "out.unfinished").exists()


@pytest.mark.slow
def test_torchrun_itself_saves_the_bytes_of_one_process(rac, tiny_folder, trace_store, tmp_path):
    """Its agent, its variables and processes that import all anew, where the other tests fork
    processes that look alike."""
    calibration = {"tokens": 1500, "batch_tokens": 128, "held_out_tokens": 100}
    (tmp_path / "recipe.yaml").write_text(recipe(entry(trace_store, calibration=calibration)))
    options = f"--nproc-per-node 2 --master-port {free_port()} -m rac_modifier.cli"
    words = ["--recipe", str(tmp_path / "recipe.yaml")]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options.split(),
         "prune", str(tiny_folder), str(tmp_path / "two"), *words],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count(f"saved to {tmp_path / 'two'}") == 1
    assert rac("prune", tiny_folder, tmp_path / "one", *words)[0] == 0
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("one", "two")
    )
    assert two == one != {}
    record = json.loads((tmp_path / "two" / "rac_run.json").read_text())
    assert record["processes"] == 2


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
