"""Pruning in several processes over gloo: the masks of one, and one clear end for all where one of them fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.started import ROOT
from tests.tiny import entry, linears, recipe, save_tiny_experts

pytestmark = pytest.mark.slow
QUIET = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
INT8 = {"config_groups": {"all": {"weights": {"num_bits": 8, "strategy": "channel"}}}}


@pytest.fixture(scope="module")
def ran(tiny_folder, trace_store, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    calibration = {"tokens": 1500, "batch_tokens": 256, "held_out_tokens": 100}
    recover = {"learning_rate": 1e-4, "tokens": 300, "held_out_tokens": 100, "step_tokens": 128}
    settings = {
        "paper": {"preset": "paper", "calibration": calibration},
        "quality": {"calibration": calibration},
        "recovered": {"calibration": calibration, "quantization": INT8, "recover": recover},
        "few": {"calibration": {"tokens": 1500, "batch_tokens": 1024}},
    }
    for name, changes in settings.items():
        (folder / f"{name}.yaml").write_text(recipe(entry(trace_store, **changes)))
    save_tiny_experts(folder / "mixture")
    of_experts = {"solver": "sparsegpt", "expert_floor": 700, "calibration": calibration}
    (folder / "experts.yaml").write_text(recipe(entry(folder / "mixture.jsonl", **of_experts)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.llmcompressor.several_processes", str(tiny_folder), str(folder)],
        cwd=folder,
        env=QUIET,
        capture_output=True,
        text=True,
        timeout=1200,
    )
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


def masks(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: linear.weight != 0 for name, linear in linears(model).items()}


@pytest.mark.parametrize("count", [2, 4])
def test_masks_are_those_of_one_process(ran, count):
    folder, told = ran
    assert told["codes"][f"paper-{count}"] == [0] * count, (folder / f"paper-{count}.0.txt").read_text()[-2000:]
    expected, found = masks(folder / "paper-1"), masks(folder / f"paper-{count}")
    same = sum(int((found[name] == mask).sum()) for name, mask in expected.items())
    assert same >= 0.999 * sum(mask.numel() for mask in expected.values())
    one, several = (result(folder / name)[0] for name in ("paper-1", f"paper-{count}"))
    assert several["processes"] == count
    assert several["divergence"]["kl"] == pytest.approx(one["divergence"]["kl"], rel=1e-3)
    assert [row["tokens"] for row in several["modules"]] == [row["tokens"] for row in one["modules"]]
    assert several["calibration"] == one["calibration"]


def test_experts_have_the_tokens_that_they_have_in_one_process(ran):
    """Routed ones and those that are added up to the floor; each process has a part of both."""
    folder, told = ran
    assert told["codes"]["experts-2"] == [0, 0], (folder / "experts-2.0.txt").read_text()[-2000:]
    one, two = (result(folder / f"experts-{count}")[0] for count in (1, 2))
    first = "model.layers.0.mlp.experts"  # before it nothing depends on how sums are rounded but attention
    assert two["order"]["order"] == one["order"]["order"] == "group"
    assert any(layer["starved"] for layer in one["experts"]["layers"].values())
    for name in ("least", "median", "most"):
        found, expected = (record["experts"]["layers"][first]["routed"][name] for record in (two, one))
        assert found == pytest.approx(expected, abs=10), name  # a token near the border may be routed elsewhere
    for row in two["modules"]:
        assert row["tokens"] >= 700
    assert two["divergence"]["kl"] == pytest.approx(one["divergence"]["kl"], rel=0.2)


def test_who_is_slow_changes_no_bit(ran):
    folder, told = ran
    assert told["codes"]["slow-4"] == [0] * 4
    assert result(folder / "slow-4") == result(folder / "paper-4")


def test_oneshot_of_upstream_under_torchrun_does_the_same(ran):
    folder, told = ran
    assert told["codes"]["upstream-2"] == [0, 0], (folder / "upstream-2.0.txt").read_text()[-2000:]
    assert result(folder / "upstream-2")[1] == result(folder / "paper-2")[1]


def test_recovery_of_quantized_weights_ends_as_in_one_process(ran):
    folder, told = ran
    assert told["codes"]["recovered-2"] == [0, 0], (folder / "recovered-2.0.txt").read_text()[-2000:]
    one, two = (result(folder / f"recovered-{count}")[0] for count in (1, 2))
    assert (one["recovery"]["processes"], two["recovery"]["processes"]) == (1, 2)
    assert two["recovery"]["kl_after"] < two["recovery"]["kl_before"]
    # the refit of a group ends for the modules of each process apart, and ALPS on random weights follows the smallest change
    assert two["recovery"]["kl_after"] == pytest.approx(one["recovery"]["kl_after"], rel=0.2)
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
