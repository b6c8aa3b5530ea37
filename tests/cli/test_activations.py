"""`rac activations`: measured on the model's own samples, written into config.json and the run record, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rac_modifier import cli
from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.sparsity_config import SparsityRecord
from rac_modifier.kernels.plan import plan_checkpoint
from tests.cli.conftest import Rac
from tests.tiny import entry, recipe, save_tiny_experts

INT8 = {"weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}
INT4 = {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
MEASURE = ("--sequences", "2", "--cap", "12")


@pytest.fixture(scope="module")
def int8_folder(
    tiny_folder: Path, trace_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model pruned to 2:4 and rounded to int8 in one run, packed."""
    folder = tmp_path_factory.mktemp("int8")
    (folder / "recipe.yaml").write_text(
        recipe(entry(trace_store, quantization={"config_groups": {"weights": INT8}}))
    )
    args = [
        "prune",
        tiny_folder,
        folder / "out",
        "-r",
        folder / "recipe.yaml",
        "-s",
        "calibration.tokens=500",
    ]
    cli.app([str(arg) for arg in args], standalone_mode=False)
    return folder / "out"


@pytest.fixture(scope="module")
def dense_int4(
    tiny_folder: Path, trace_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model rounded to int4 without pruning, as compressed-tensors stores it."""
    folder = tmp_path_factory.mktemp("int4")
    quantization = {"config_groups": {"weights": INT4}}
    settings = entry(trace_store, solver="none", mask_structure=None, quantization=quantization)
    (folder / "recipe.yaml").write_text(recipe(settings))
    args = [
        "prune",
        tiny_folder,
        folder / "out",
        "-r",
        folder / "recipe.yaml",
        "-s",
        "calibration.tokens=500",
    ]
    cli.app([str(arg) for arg in args], standalone_mode=False)
    return folder / "out"


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_measured_written_and_read_again(rac: Rac, int8_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(int8_folder, tmp_path / "model")
    before = config_of(folder)
    code, out, _ = rac("activations", folder, *MEASURE, "--check")
    assert (code, out.splitlines()[-1]) == (0, "nothing was written (--check)")
    assert config_of(folder) == before

    code, out, _ = rac("activations", folder, *MEASURE, "--json")
    assert code == 0
    found = json.loads(out)
    int8 = sorted(name for name, row in found["layers"].items() if row["bits"] == 8)
    assert len(int8) > 10  # noise of the usual kind is far below what pruning costs
    assert len(found["layers"]) == 14
    assert 0 < found["kl"] < 1e-3
    assert SparsityRecord.of(config_of(folder)).int8_activations == tuple(int8)
    record = json.loads((folder / "rac_run.json").read_text())
    assert record["activations"]["layers"] == found["layers"]
    assert str(tmp_path) not in json.dumps(record)
    kernels = {row.module: row.decision.kernel for row in plan_checkpoint(folder)}
    assert all(
        ("activations in" in kernel) == (name in int8)
        for name, kernel in kernels.items()
        if "int8" in kernel
    )
    load_model(folder)

    code, out, _ = rac("activations", folder, *MEASURE, "--limit", "0")
    assert code == 0
    assert "0 of 14 layers in 8 bits: 8 bits add at least" in out
    assert config_of(folder) == before


def test_what_it_cannot_measure_is_refused(
    rac: Rac, int8_folder: Path, sparse_folder: Path, tmp_path: Path
) -> None:
    assert (
        "none of its layers may have activations of 8 bits" in rac("activations", sparse_folder)[2]
    )
    folder = shutil.copytree(int8_folder, tmp_path / "model")
    (folder / "rac_run.json").unlink()
    code, _, error = rac("activations", folder)
    assert code == 1
    assert "rac_run.json has no error of model.layers.0" in error
    assert "name the model that was quantized (--dense MODEL)" in error


def test_a_dense_checkpoint_of_int4(rac: Rac, dense_int4: Path, tmp_path: Path) -> None:
    """The record stands beside quantization_config, where transformers and compressed-tensors load the model as before."""
    folder = shutil.copytree(dense_int4, tmp_path / "model")
    before = config_of(folder)
    assert before["quantization_config"]["format"] == "pack-quantized"
    assert "rac_sparsity" not in before
    code, out, _ = rac("activations", folder, *MEASURE, "--limit", "0.05", "--json")
    assert code == 0
    found = json.loads(out)
    int8 = sorted(name for name, row in found["layers"].items() if row["bits"] == 8)
    assert len(found["layers"]) == 14
    assert int8
    for row in found["layers"].values():
        assert (row["bits"] == 8) == (row["error"] <= 0.05 * row["own_error"])
    written = config_of(folder)
    assert written.pop("rac_sparsity") == {
        "storage": "dense",
        "modules": {},
        "int8_activations": int8,
    }
    assert written == before
    record = json.loads((folder / "rac_run.json").read_text())
    assert record["activations"]["layers"] == found["layers"]
    own = {module["name"]: module["relative_error"] for module in record["modules"]}
    assert {name: row["own_error"] for name, row in found["layers"].items()} == own
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(
            load(folder)(input_ids=ids).logits, load(dense_int4)(input_ids=ids).logits
        )

    assert rac("activations", folder, *MEASURE, "--limit", "0")[0] == 0
    assert config_of(folder) == before


def test_a_checkpoint_of_another_tool(
    rac: Rac, dense_int4: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Without a run record own errors are measured against the dense model, and it gets no run record."""
    folder = shutil.copytree(dense_int4, tmp_path / "model")
    (folder / "rac_run.json").unlink()
    code, out, _ = rac("activations", folder, *MEASURE, "--limit", "0.05", "--dense", tiny_folder)
    assert code == 0
    assert not (folder / "rac_run.json").exists()
    assert config_of(folder)["rac_sparsity"]["int8_activations"]

    code, out, _ = rac(
        "activations", dense_int4, *MEASURE, "--dense", tiny_folder, "--check", "--json"
    )
    found = json.loads(out)
    recorded = json.loads((dense_int4 / "rac_run.json").read_text())
    assert "activations" not in recorded
    for module in recorded["modules"]:  # measured on other tokens
        assert 0.2 < found["layers"][module["name"]]["own_error"] / module["relative_error"] < 5


def test_another_model_than_the_one_that_was_quantized(rac: Rac, dense_int4: Path) -> None:
    code, _, error = rac("activations", dense_int4, "--dense", "reasoner")
    assert code == 1
    assert "in the dense model; name the model that was quantized" in error
    code, _, error = rac("activations", dense_int4, "--dense", dense_int4)
    assert code == 1
    assert "quantized in the dense model too" in error


def test_experts_of_a_dense_checkpoint_are_left_out(rac: Rac, tmp_path: Path) -> None:
    model = save_tiny_experts(tmp_path / "experts")
    settings = entry(
        tmp_path / "own.jsonl",
        solver="none",
        mask_structure=None,
        quantization={"config_groups": {"weights": INT4}},
    )
    (tmp_path / "recipe.yaml").write_text(recipe(settings))
    assert (
        rac(
            "prune",
            model,
            tmp_path / "out",
            "-r",
            tmp_path / "recipe.yaml",
            "-s",
            "calibration.tokens=500",
        )[0]
        == 0
    )
    code, out, _ = rac("activations", tmp_path / "out", *MEASURE, "--limit", "1")
    assert code == 0
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(".experts." in name and name.endswith(".weight_packed") for name in names) == 24
    assert "left out: 24 modules: routed experts take 16 bits" in out
    recorded = SparsityRecord.of(config_of(tmp_path / "out")).int8_activations
    assert recorded
    assert all(".self_attn." in name for name in recorded)
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert record["activations"]["left_out"] == {"routed experts take 16 bits": 24}
