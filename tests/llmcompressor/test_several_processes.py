"""Pruning in several processes over gloo: the bits of one, and one clear end for all where one of them fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import forked
from tests.llmcompressor import several_processes
from tests.tiny import entry, recipe, save_tiny_experts

pytestmark = pytest.mark.slow
INT4 = {
    "config_groups": {"all": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}}
}
INT8 = {"config_groups": {"all": {"weights": {"num_bits": 8, "strategy": "channel"}}}}


@pytest.fixture(scope="module")
def ran(tiny_folder, trace_store, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    # about 14 batches, so that two and four processes have some in each of several shards
    calibration = {"tokens": 1500, "batch_tokens": 128, "held_out_tokens": 100}
    recover = {"learning_rate": 1e-4, "tokens": 300, "held_out_tokens": 100, "step_tokens": 128}
    settings = {
        "paper": {"preset": "paper", "calibration": calibration},
        "quality": {"calibration": calibration},
        "int4": {"calibration": calibration, "quantization": INT4},
        "recovered": {"calibration": calibration, "quantization": INT8, "recover": recover},
        "few": {"calibration": {"tokens": 1500, "batch_tokens": 1024}},
    }
    for name, changes in settings.items():
        (folder / f"{name}.yaml").write_text(recipe(entry(trace_store, **changes)))
    save_tiny_experts(folder / "mixture")
    of_experts = {"solver": "sparsegpt", "expert_floor": 700, "calibration": calibration}
    (folder / "experts.yaml").write_text(recipe(entry(folder / "mixture.jsonl", **of_experts)))
    done = forked.run(several_processes.main, [str(tiny_folder), str(folder)], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def errors(folder: Path, name: str, rank: int) -> list[str]:
    """The lines of a process that are errors or of a traceback."""
    text = (folder / f"{name}.{rank}.txt").read_text()
    return [line for line in text.splitlines() if line.startswith(("error:", "Traceback"))]


def result(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Of a saved checkpoint, the record without its times, and the bytes of its weights."""
    record = json.loads((folder / "rac_run.json").read_text())
    record.pop("time")
    for part in record.get("recovery", {}), record["divergence"]:
        part.pop("seconds", None), part.pop("cpu_seconds", None)
    return record, {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("name", "count"), [("paper", 2), ("paper", 4), ("quality", 2), ("quality", 4), ("int4", 3)]
)
def test_any_number_of_processes_saves_the_bytes_of_one(ran, name, count):
    """Of 3 and 4 processes, some are slow."""
    folder, told = ran
    assert told["codes"][f"{name}-{count}"] == [0] * count, (
        folder / f"{name}-{count}.0.txt"
    ).read_text()[-2000:]
    (one, expected), (several, found) = (
        result(folder / f"{name}-{number}") for number in (1, count)
    )
    assert found == expected
    assert several.pop("processes") == count
    assert several == one


def test_experts_are_those_of_one_process(ran):
    """Calibrated on routed tokens, and on others that are added up to the floor; each process has a part of both."""
    folder, told = ran
    assert told["codes"]["experts-2"] == [0, 0], (folder / "experts-2.0.txt").read_text()[-2000:]
    (one, expected), (two, found) = (result(folder / f"experts-{count}") for count in (1, 2))
    assert one["order"]["order"] == "group"
    assert any(layer["starved"] for layer in one["experts"]["layers"].values())
    assert min(row["tokens"] for row in one["modules"]) >= 700
    assert found == expected
    assert two.pop("processes") == 2
    assert two == one


def test_a_model_larger_than_the_accelerators_is_measured_and_pruned_as_any_other(ran):
    """Its weights, shared by the processes, are streamed to the accelerator where the held-out divergence is measured."""
    folder, told = ran
    assert told["codes"]["streamed-2"] == [0, 0], (folder / "streamed-2.0.txt").read_text()[-2000:]
    assert result(folder / "streamed-2") == result(folder / "quality-2")


def test_oneshot_of_upstream_under_torchrun_does_the_same(ran):
    folder, told = ran
    assert told["codes"]["upstream-2"] == [0, 0], (folder / "upstream-2.0.txt").read_text()[-2000:]
    assert result(folder / "upstream-2")[1] == result(folder / "paper-2")[1]


def test_recovery_of_quantized_weights_ends_as_in_one_process(ran):
    folder, told = ran
    assert told["codes"]["recovered-2"] == [0, 0], (folder / "recovered-2.0.txt").read_text()[
        -2000:
    ]
    one, two = (result(folder / f"recovered-{count}")[0] for count in (1, 2))
    assert (one["recovery"]["processes"], two["recovery"]["processes"]) == (1, 2)
    assert two["recovery"]["kl_after"] < two["recovery"]["kl_before"]
    assert two["recovery"]["kl_before"] == pytest.approx(one["recovery"]["kl_before"], rel=1e-3)
    # training adds up gradients in the order of FSDP, and measures batches of other shapes
    assert two["recovery"]["kl_after"] == pytest.approx(one["recovery"]["kl_after"], rel=0.02)
    assert not (folder / "rac_recovery").exists()


def test_too_few_batches_are_refused(ran):
    folder, told = ran
    assert told["codes"]["many-4"] == [1] * 4
    assert "error: 4 processes share" in errors(folder, "many-4", 0)[0]


def test_an_error_in_one_process_ends_all_with_its_message(ran):
    folder, told = ran
    assert told["codes"]["full"] == [1, 1]
    assert errors(folder, "full", 1) == ["error: the disk of this process is full; make room"]
    # the other one says nothing where it can know that the first has said it
    assert errors(folder, "full", 0) == []


def test_a_killed_process_ends_the_other_with_one_line(ran):
    folder, told = ran
    assert told["codes"]["gone"] == [1, -9]
    (line,) = errors(folder, "gone", 0)
    assert "another of the 2 processes has ended" in line


def test_a_process_that_does_not_answer_ends_the_other(ran):
    folder, told = ran
    assert told["codes"]["stuck"] == [1, 1]
    (line,) = errors(folder, "stuck", 0)
    assert "did not answer" in line
