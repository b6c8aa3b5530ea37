"""`rac inspect`: the table, the _totals, and what is printed of speed."""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rac_modifier import cli
from rac_modifier.checkpoint.inspect import CheckpointReport, ModuleRow
from rac_modifier.cli.inspect import _totals, render_report
from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.quantization_config import WeightScheme
from rac_modifier.kernels.cpu.support import support


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
    codes = Encoding("int", 8)
    scheme = WeightScheme(codes, "channel", "int-quantized", "int8 per token")
    assert _totals(report(matrix(), EMBEDDING, quantization=(scheme,))) == [
        "all tensors: 613,500 bytes, 801,000 with every matrix dense",
        "quantized weights: int8 one scale per channel (int-quantized), activations int8 per token",
        "1 pruned matrices, 50.00% of their weights are zero",
    ]
    assert "no matrix is recorded as pruned" in _totals(report(EMBEDDING))


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
