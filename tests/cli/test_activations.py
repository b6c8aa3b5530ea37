"""`rac activations`: measured on the model's own samples, written into config.json and the run record, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rac_modifier import cli
from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.sparsity_config import SparsityRecord
from rac_modifier.kernels.plan import plan_checkpoint
from tests.cli.conftest import Rac
from tests.tiny import entry, recipe

INT8 = {"weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}
MEASURE = ("--sequences", "2", "--cap", "12")


@pytest.fixture(scope="module")
def int8_folder(tiny_folder: Path, trace_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model pruned to 2:4 and rounded to int8 in one run, packed."""
    folder = tmp_path_factory.mktemp("int8")
    (folder / "recipe.yaml").write_text(recipe(entry(trace_store, quantization={"config_groups": {"weights": INT8}})))
    args = ["prune", tiny_folder, folder / "out", "-r", folder / "recipe.yaml", "-s", "calibration.tokens=500"]
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
    assert all(("activations in" in kernel) == (name in int8) for name, kernel in kernels.items() if "int8" in kernel)
    load_model(folder)

    code, out, _ = rac("activations", folder, *MEASURE, "--limit", "0")
    assert code == 0
    assert "0 of 14 layers in 8 bits: KL " in out
    assert config_of(folder) == before


def test_what_it_cannot_measure_is_refused(rac: Rac, int8_folder: Path, sparse_folder: Path, tmp_path: Path) -> None:
    assert "none of its packed weights is int8 or int4" in rac("activations", sparse_folder)[2]
    folder = shutil.copytree(int8_folder, tmp_path / "model")
    (folder / "rac_run.json").unlink()
    code, _, error = rac("activations", folder)
    assert code == 1
    assert "rac_run.json has no error of model.layers.0" in error
    assert "set RAC_ACTIVATIONS=int8 for all layers unmeasured" in error
