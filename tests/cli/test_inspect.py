"""`rac inspect`: the table, the totals, and what is printed of speed."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rac_modifier import cli
from rac_modifier.checkpoint.hf_quantizer import load_model
from rac_modifier.checkpoint.inspect import CheckpointReport, ModuleRow
from rac_modifier.cli.inspect import render_report, totals
from rac_modifier.formats.quantization_config import SparsityRecord, WeightScheme
from rac_modifier.kernels.cpu.support import support
from tests.cli.conftest import prune
from tests.tiny import entry


def matrix(name: str = "layers.0.up", **changes: object) -> ModuleRow:
    row = {"rows": 100, "columns": 1000, "dtype": "F32", "stored": "sparse-24-bitmask"}
    row |= {"sparsity": 0.5, "structure": "2:4", "stored_bytes": 212_500, "dense_bytes": 400_000}
    return ModuleRow(name=name, **{**row, **changes})


def report(*modules: ModuleRow, **changes: object) -> CheckpointReport:
    size = 1000 + sum(row.stored_bytes for row in modules)
    return CheckpointReport(Path("out"), "sparse-24-bitmask", modules, size, **changes)


EMBEDDING = matrix("embed", stored="dense", sparsity=0.0, stored_bytes=400_000, structure=None)


def test_the_table_has_a_row_per_matrix_and_whole_lines():
    damaged = matrix("layers.1.up", rows=0, columns=0, sparsity=None, problem="\x1b[2K" + "x" * 300)
    first, head, *rows = render_report(report(matrix("[red]up"), damaged)).splitlines()
    assert first == "out: sparse-24-bitmask"
    assert head.split()[:3] == ["module", "shape", "dtype"]
    cells = ["[red]up", "100x1000", "F32", "sparse-24-bitmask", "2:4", "0.5000", "212,500"]
    assert rows[0].split() == cells
    assert rows[1].split()[-2:] == ["DAMAGED:", "\\x1b[2K" + "x" * 300]


def test_totals():
    scheme = WeightScheme("int", 8, "channel", None, True, "int-quantized", "int8 per token")
    assert totals(report(matrix(), EMBEDDING, quantization=(scheme,))) == [
        "all tensors: 613,500 bytes, 801,000 with every matrix dense",
        "quantized weights: int8 one scale per channel (int-quantized), activations int8 per token",
        "1 pruned matrices, 50.00% of their weights are zero",
    ]
    assert "no matrix is recorded as pruned" in totals(report(EMBEDDING))


@pytest.mark.parametrize("option", ["--dense", "--source", "--column"])
def test_options_of_activations_alone_are_refused(rac, sparse_folder, option):
    code, out, error = rac("inspect", sparse_folder, option, "x")
    assert (code, out) == (1, "")
    assert f"{option} needs --activations LIMIT; add it, or leave {option} out" in error


def test_dense_weights_of_few_bits(tmp_path, capsys):
    grid = {"num_bits": 4, "strategy": "group", "group_size": 64}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": grid}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    tensors = {
        "a.weight_packed": torch.zeros(64, 16, dtype=torch.int32),
        "a.weight_scale": torch.ones(64, 2, dtype=torch.bfloat16),
        "a.weight_shape": torch.tensor([64, 128]),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    cli.app(["inspect", str(tmp_path)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "(with --quantization rac if another tool saved it):\na (64" in printed
    isa = support().isa
    assert isa in (None, "portable") or f"int4 kernel {isa}: 0.53" in printed


def test_json_has_what_is_printed(rac, sparse_folder):
    actual = json.loads(rac.output("inspect", sparse_folder, "--json"))
    assert actual["format"] == "sparse-24-bitmask"
    assert (actual["sound"], actual["sparsity"]) == (True, 0.5)
    rows = {row["name"]: row for row in actual["modules"]}
    assert rows["model.layers.1.mlp.down_proj"]["structure"] == "2:4"
    served = {row["module"]: row for row in actual["served"]}
    assert served.keys() == rows.keys() - {"lm_head", "model.embed_tokens"}
    assert all(row["reason"] for row in actual["served"])
    printed = rac.output("inspect", sparse_folder)
    assert "Served with vLLM on this machine's CPU:" in printed
    # a float32 checkpoint is compared with float32: no ceiling below one where a kernel gains
    gains = [float(gain) for gain in re.findall(r"at most ([0-9.]+)x", printed)]
    assert all(gain > 1.1 for gain in gains)
    assert gains or "dense because" in printed


def test_a_checkpoint_that_is_not_sound_ends_with_status_1(rac, sparse_folder, tmp_path):
    shutil.copytree(sparse_folder, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.shape"].fill_(2**62)
    save_file(tensors, file, metadata={"format": "pt"})
    code, stdout, stderr = rac("inspect", tmp_path / "damaged")
    assert (code, "DAMAGED: model.layers.1.mlp.down_proj" in stdout) == (1, True)
    assert "not sound, see the notes of its matrices" in stderr
    code, stdout, _ = rac("inspect", tmp_path / "damaged", "--json")
    assert (code, json.loads(stdout)["sound"]) == (1, False)


INT8 = {"weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}
INT4 = {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}


@pytest.fixture
def few(monkeypatch) -> None:
    """Two short samples are enough here."""
    module = importlib.import_module("rac_modifier.cli.inspect")
    monkeypatch.setattr(module, "_SAMPLES", 2)
    monkeypatch.setattr(module, "_CAP", 12)


@pytest.fixture(scope="module")
def quantized(tiny_folder, trace_store, tmp_path_factory) -> dict[str, Path]:
    """The tiny model at 2:4 in int8, packed, and in int4 without pruning; not to be written to."""
    dense = {"solver": "none", "mask_structure": None}
    folders = {}
    for name, group, more in (("sparse", INT8, {}), ("dense", INT4, dense)):
        settings = entry(trace_store, quantization={"config_groups": {"g": group}}, **more)
        folders[name] = prune(tiny_folder, tmp_path_factory.mktemp(name), settings)
    return folders


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("kind", "limit"), [("sparse", 0.01), ("dense", 0.05)])
def test_activations_are_measured_recorded_and_read_again(
    rac, few, quantized, tmp_path, kind, limit
):
    folder = shutil.copytree(quantized[kind], tmp_path / "model")
    before = config_of(folder)
    measured = json.loads(rac.output("inspect", folder, "--activations", limit, "--json"))
    int8 = sorted(name for name, row in measured["layers"].items() if row["bits"] == 8)
    assert len(measured["layers"]) == 14
    assert int8
    for row in measured["layers"].values():
        assert (row["bits"] == 8) == (row["error"] <= limit * row["own_error"])
    assert SparsityRecord.of(config_of(folder)).int8_activations == tuple(int8)
    assert config_of(folder).get("quantization_config") == before.get("quantization_config")
    record = json.loads((folder / "rac_run.json").read_text())
    assert record["activations"]["layers"] == measured["layers"]
    assert str(tmp_path) not in json.dumps(record)
    errors = {module["name"]: module["relative_error"] for module in record["modules"]}
    assert {name: row["own_error"] for name, row in measured["layers"].items()} == errors
    ids = torch.tensor([[5, 6, 7]])
    outputs = (load_model(one)(input_ids=ids).logits for one in (folder, quantized[kind]))
    assert torch.equal(*outputs)

    out = rac.output("inspect", folder, "--activations", 0)
    assert "0 of 14 layers in 8 bits, where these add at most 0 of" in out
    assert SparsityRecord.of(config_of(folder)).int8_activations == ()


def test_activations_of_a_checkpoint_of_another_tool(rac, few, quantized, tiny_folder, tmp_path):
    """Without a run record own errors are measured against the dense model."""
    folder = shutil.copytree(quantized["dense"], tmp_path / "model")
    recorded = json.loads((folder / "rac_run.json").read_text())
    (folder / "rac_run.json").unlink()
    words = ("inspect", folder, "--activations", 0.05)
    code, _, error = rac(*words)
    assert code == 1
    assert "name the model that was quantized (--dense MODEL)" in error
    out = rac.output(*words, "--dense", tiny_folder, "--json")
    assert not (folder / "rac_run.json").exists()
    assert config_of(folder)["rac_sparsity"]["int8_activations"]
    layers = json.loads(out)["layers"]
    for module in recorded["modules"]:  # on other tokens: 1.0 to 5.3 times, by processor
        assert 0.1 < layers[module["name"]]["own_error"] / module["relative_error"] < 10
    assert "in the dense model; name what" in rac(*words, "--dense", "reasoner")[2]
    assert "no layer" in rac(*words, "--dense", folder)[2]
