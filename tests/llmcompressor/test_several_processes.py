"""Pruning in several processes over gloo: the bits of one, killed or not, and one clear end."""

import json
from pathlib import Path

import pytest

from tests import forked
from tests.llmcompressor import several_processes
from tests.llmcompressor.modifier_helpers import INT8
from tests.llmcompressor.several_processes import KILLS
from tests.llmcompressor.test_resume import result
from tests.tiny import entry, recipe, save_tiny_experts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tiny_folder, trace_store, tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("processes")
    # about 14 batches, so that two and four processes have some in each of several shards
    calibration = {"tokens": 1500, "batch_tokens": 128, "held_out_tokens": 100}
    recover = {"learning_rate": 1e-4, "tokens": 300, "held_out_tokens": 100, "step_tokens": 128}
    settings = {
        "paper": {"preset": "paper", "calibration": calibration},
        "quality": {"calibration": calibration},
        "recovered": {"calibration": calibration, "quantization": INT8, "recover": recover},
    }
    for name, changes in settings.items():
        (folder / f"{name}.yaml").write_text(recipe(entry(trace_store, **changes)))
    save_tiny_experts(folder / "mixture")
    of_experts = {"solver": "sparsegpt", "expert_floor": 700, "calibration": calibration}
    (folder / "experts.yaml").write_text(recipe(entry(folder / "mixture.jsonl", **of_experts)))
    process = forked.run(several_processes.main, [str(tiny_folder), str(folder)], folder)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, json.loads(process.stdout.splitlines()[-1])


def errors(folder: Path, name: str, rank: int) -> list[str]:
    """The lines of a process that are errors or of a traceback."""
    text = (folder / f"{name}.{rank}.txt").read_text()
    return [line for line in text.splitlines() if line.startswith(("error:", "Traceback"))]


def assert_as_one(ran, name: str, one: str) -> None:
    """The run of two processes ended well, with the bytes and the record of one."""
    folder, codes = ran
    assert codes[name] == [0, 0], (folder / f"{name}.0.txt").read_text()[-2000:]
    (expected, bytes_of_one), (record, actual) = result(folder / one), result(folder / name)
    assert actual == bytes_of_one
    assert record.pop("processes") == 2
    assert record == expected
    assert not (folder / f"{name}.unfinished").exists()


def test_any_number_of_processes_saves_the_bytes_of_one(ran):
    """Experts are filled up to the floor with tokens of all processes."""
    assert_as_one(ran, "quality-2", "quality-1")
    assert_as_one(ran, "experts-2", "experts-1")
    record, _ = result(ran[0] / "experts-2")
    assert any(layer["starved"] for layer in record["experts"]["layers"].values())
    assert min(row["tokens"] for row in record["modules"]) >= 700


def test_oneshot_of_upstream_under_torchrun_does_the_same(ran):
    """Two processes of a user's script, next to four of `rac prune`."""
    folder, codes = ran
    assert codes["upstream-2"] == [0, 0], (folder / "upstream-2.0.txt").read_text()[-2000:]
    assert codes["paper-4"] == [0] * 4
    assert result(folder / "upstream-2")[1] == result(folder / "paper-4")[1]


def test_recovery_of_quantized_weights_ends_as_in_one_process(ran):
    folder, codes = ran
    assert codes["recovered-2"] == [0, 0], (folder / "recovered-2.0.txt").read_text()[-2000:]
    one, two = (result(folder / f"recovered-{count}")[0]["recovery"] for count in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["kl_after"] < two["kl_before"]
    assert two["kl_before"] == pytest.approx(one["kl_before"], rel=1e-3)
    # training adds up gradients in the order of FSDP, and measures batches of other shapes
    assert two["kl_after"] == pytest.approx(one["kl_after"], rel=0.02)
    assert not (folder / "rac_recovery").exists()


def test_an_error_in_one_process_ends_all_with_its_message(ran):
    folder, codes = ran
    assert codes["full"] == [1, 1]
    assert errors(folder, "full", 1) == ["error: the disk of this process is full; make room"]
    # the other one repeats it, or says nothing where it can know that the first has said it
    repeated = "error: process 1 of 2 has failed: the disk of this process is full; make room"
    assert errors(folder, "full", 0) in ([], [repeated])


def test_a_run_that_is_killed_at_any_moment_ends_as_an_undisturbed_one(ran):
    """The other process ends with one line; the next start goes on from what was written."""
    folder, codes = ran
    for moment, kill in KILLS.items():
        (rank,) = kill
        ends = codes[moment]
        assert ends.pop(rank) == -9, moment
        assert ends == [1], moment
    (line,) = errors(folder, next(iter(KILLS)), 0)
    assert "another of the 2 processes has ended" in line
    assert_as_one(ran, "killed", "quality-1")
