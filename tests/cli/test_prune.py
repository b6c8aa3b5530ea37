import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import NAME, entry, recipe

ROOT = Path(__file__).parents[2]


def test_prune_writes_a_checkpoint_and_says_where(rac, tiny_folder, recipe_file, tmp_path):
    out = tmp_path / "sparse"
    code, stdout, _ = rac(
        "prune", tiny_folder, out, "-r", recipe_file, "-s", "calibration.tokens=500"
    )
    assert code == 0
    assert f"rac inspect {out}" in stdout
    record = json.loads((out / "rac_run.json").read_text())
    assert record["calibration"]["tokens"] == 500


def test_a_mistake_ends_in_one_message_and_exit_code_1(rac, tiny_folder, recipe_file, tmp_path):
    code, stdout, stderr = rac(
        "prune", tiny_folder, tmp_path / "out", "-r", recipe_file, "-s", "solver=admm"
    )
    assert code == 1
    assert stderr.startswith("error: ")
    assert "'admm'" in stderr
    assert "Traceback" not in stderr + stdout
    assert not (tmp_path / "out").exists()


def test_check_names_each_valid_recipe_and_runs_nothing(rac, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(recipe({"sparsity": 0.5}))
    calibrates = ROOT / "rac_modifier" / "recipes" / "rac_gptq_w4a16.yaml"
    code, stdout, stderr = rac("prune", "--check", "rac_2of4", other, calibrates)
    assert (code, stderr) == (0, "")
    assert [line.rpartition("/")[2] for line in stdout.splitlines()] == [
        f"rac_2of4: valid ({NAME})",
        f"other.yaml: valid ({NAME})",
        "rac_gptq_w4a16.yaml: valid (ReasoningAwareCalibrationModifier)",
    ]
    assert list(tmp_path.iterdir()) == [other]


def test_check_reports_every_mistake_of_every_recipe(rac, tmp_path):
    for name, settings in {
        "a": {"sparsty": 0.5},
        "b": entry(),
        "c": entry(refit=True, iterations=0),
    }.items():
        (tmp_path / f"{name}.yaml").write_text(recipe(settings))
    code, stdout, stderr = rac("prune", "--check", *(tmp_path / f"{name}.yaml" for name in "abc"))
    assert code == 1
    assert "b.yaml: valid" in stdout
    for part in ("a.yaml: sparsty: there is no such setting", "c.yaml: iterations: "):
        assert part in stderr


def test_check_takes_overrides_and_the_recipe_option(rac, recipe_file):
    assert rac("prune", "--check", "-r", recipe_file, "-s", "calibration.tokens=5")[0] == 0
    code, _, stderr = rac(
        "prune", "--check", recipe_file, "--preset", "paper", "-s", "iterations=4"
    )
    assert code == 1
    assert "iterations: 4 has no effect with solver: sparsegpt" in stderr


@pytest.mark.parametrize(
    "args", [["m"], ["m", "out"], ["m", "out", "more", "-r", "x.yaml"], []], ids=str
)
def test_pruning_needs_a_model_a_folder_and_a_recipe(rac, args):
    code, _, stderr = rac("prune", *args)
    assert code == 2
    assert "rac prune MODEL OUTPUT --recipe RECIPE" in " ".join(stderr.split())
    code, _, stderr = rac("prune", "--check")
    assert (code, "--check needs at least one recipe" in stderr) == (1, True)


def test_schema_prints_the_published_file_and_nothing_else():
    """In a process of its own, where nothing else writes to standard output."""
    published = ROOT / "docs" / "recipe.schema.json"
    done = subprocess.run(
        [sys.executable, "-m", "rac_modifier.cli", "schema"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, published.read_text())


def test_a_whole_command_is_checked(rac, tiny_folder, recipe_file, tmp_path):
    """With a model and an output folder `--check` reads and writes nothing, and refuses what the run would refuse."""
    command = ["prune", tiny_folder, tmp_path / "out", "-r", recipe_file, "--check"]
    code, stdout, _ = rac(*command)
    assert code == 0
    assert f"{recipe_file}: valid" in stdout
    assert "run the same command without --check" in stdout
    assert not (tmp_path / "out").exists()
    for name, broken in (("no-model", 1), ("full", 2)):
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "x").touch()
        changed = [*command]
        changed[broken] = tmp_path / name
        code, _, stderr = rac(*changed)
        assert code != 0
        assert name in stderr
    code, _, stderr = rac("prune", recipe_file, "--check", "--precision", "float32")
    assert code != 0
    assert "--precision float32 has no effect" in stderr


@pytest.mark.slow
def test_torchrun_itself_saves_the_bytes_of_one_process(tiny_folder, trace_store, tmp_path):
    """Its agent, its variables and processes that import all anew, where the other tests fork processes that look alike."""
    calibration = {"tokens": 1500, "batch_tokens": 128, "held_out_tokens": 100}
    (tmp_path / "recipe.yaml").write_text(recipe(entry(trace_store, calibration=calibration)))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
    ]
    saved = {}
    for name, start in {"one": [sys.executable], "two": command}.items():
        words = [
            "-m",
            "rac_modifier.cli",
            "prune",
            tiny_folder,
            tmp_path / name,
            "--recipe",
            tmp_path / "recipe.yaml",
        ]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*start, *map(str, words)], capture_output=True, text=True, env=variables
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count(f"saved to {tmp_path / name}") == 1
        saved[name] = {
            path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")
        }
    assert saved["two"] == saved["one"] != {}
    record = json.loads((tmp_path / "two" / "rac_run.json").read_text())
    assert record["processes"] == 2
    assert "processes" not in json.loads((tmp_path / "one" / "rac_run.json").read_text())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
