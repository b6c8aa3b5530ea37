"""`rac inspect`: the table, the totals, and what is printed of speed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rac_modifier import cli
from rac_modifier.checkpoint.inspect import CheckpointReport, ModuleRow
from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.checkpoint.quantization_config import WeightScheme
from rac_modifier.cli.inspect import render_report, speed_line, totals
from rac_modifier.kernels.cpu.support import support
from tests.tiny import linears, tiny_model


def matrix(name: str = "layers.0.up", **changes: object) -> ModuleRow:
    row = {
        "rows": 100,
        "columns": 1000,
        "dtype": "F32",
        "stored": "sparse-24-bitmask",
        "sparsity": 0.5,
    }
    row |= {"stored_bytes": 212_500, "dense_bytes": 400_000, "structure": "2:4", "pattern_ok": True}
    return ModuleRow(name=name, **{**row, **changes})


def report(*modules: ModuleRow, **changes: object) -> CheckpointReport:
    return CheckpointReport(
        Path("out"), "sparse-24-bitmask", modules, 1000, **{"run_record": None, **changes}
    )


def planned(
    row: ModuleRow, bytes_per_weight: float, dense: float, sparse: bool = True
) -> SimpleNamespace:
    kernel = "sparse kernel avx2" if sparse else "dense"
    decision = SimpleNamespace(
        sparse=sparse,
        kernel=kernel,
        bytes_per_weight=bytes_per_weight,
        ceiling=dense / bytes_per_weight,
    )
    return SimpleNamespace(module=row.name, rows=row.rows, columns=row.columns, decision=decision)


EMBEDDING = matrix(
    "embed", stored="dense", sparsity=0.0, stored_bytes=400_000, structure=None, pattern_ok=None
)


def test_the_table_has_a_row_per_matrix_and_whole_lines() -> None:
    damaged = matrix(
        "layers.1.up", rows=0, columns=0, sparsity=None, problem="layers.1.up.bitmask: " + "x" * 300
    )
    lines = render_report(report(matrix(), damaged)).splitlines()
    assert lines[0] == "out: sparse-24-bitmask"
    head, rows = next(
        (line, lines[n:]) for n, line in enumerate(lines) if line.startswith("module")
    )
    assert head.split() == [
        "module",
        "shape",
        "dtype",
        "stored",
        "pattern",
        "sparsity",
        "bytes/weight",
        "bytes",
        "note",
    ]
    found = {line.split()[0]: line.split()[1:] for line in rows if line.startswith("layers")}
    assert found["layers.0.up"] == [
        "100x1000",
        "F32",
        "sparse-24-bitmask",
        "2:4",
        "ok",
        "0.5000",
        "2.1250",
        "212,500",
    ]
    assert found["layers.1.up"][-3:] == ["DAMAGED:", "layers.1.up.bitmask:", "x" * 300]


def test_brackets_are_text() -> None:
    assert "[red]layers[/red]" in render_report(report(matrix("[red]layers[/red]")))


def test_totals() -> None:
    scheme = WeightScheme("int", 8, "channel", None, True, "int-quantized", "int8 per token")
    record = {"method": "alps", "base_model": "a/b", "calibration": {"tokens": 5}}
    assert totals(report(matrix(), EMBEDDING, run_record=record, quantization=(scheme,))) == [
        "all tensors: 613,500 bytes stored, 801,000 with every matrix dense",
        "quantized weights: int8 one scale per channel (int-quantized), activations int8 per token",
        "1 pruned matrices, 50.00% of their weights are zero",
        "run record: alps on a/b; calibration: tokens 5",
    ]
    assert "no matrix is recorded as pruned" in totals(report(EMBEDDING))
    assert "NOT SOUND: see the notes of the rows above" in totals(report(matrix(pattern_ok=False)))


def test_speed_names_the_kernel_and_the_baseline() -> None:
    """Float32 weights at 2:4: 2.125 bytes instead of 4, and the embedding as it is in both."""
    row = matrix()
    line = speed_line(report(row, EMBEDDING), [planned(row, 2.125, 4)])
    assert (
        "reads 0.6 MB of weights per token with the sparse kernel avx2, and 0.8 MB with every matrix dense"
        in line
    )
    assert f"at most {800_000 / 612_500:.2f}x as fast as the dense model" in line


def test_a_matrix_that_stays_dense_is_counted_dense_in_both() -> None:
    sparse, dense = matrix("a"), matrix("b")
    line = speed_line(
        report(sparse, dense), [planned(sparse, 2, 4), planned(dense, 3.9, 4, sparse=False)]
    )
    assert f"at most {800 / 600:.2f}x" in line


def test_a_matrix_that_decoding_does_not_read_is_not_counted() -> None:
    row = matrix("a")
    other = matrix("embed", stored_bytes=10**9, read_per_token=False)
    assert "at most 2.00x" in speed_line(report(row, other), [planned(row, 2, 4)])


def test_no_ceiling_where_nothing_runs_sparse() -> None:
    row = matrix()
    line = speed_line(report(row), [planned(row, 3.9, 4, sparse=False)])
    assert (
        line
        == "No module runs on a sparse kernel here, so decoding is as fast as that of the dense model."
    )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A float32 checkpoint is compared with float32: no ceiling below one beside kernels that gain."""
    model = tiny_model()
    modules = linears(model)
    for linear in modules.values():
        linear.weight.data.view(-1, 4)[:, :2] = 0
    model.save_pretrained(tmp_path)
    pack_checkpoint(tmp_path, dict.fromkeys(modules, "2:4"), ["lm_head"])
    cli.app(["inspect", str(tmp_path)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in printed
    assert "Served with vLLM on this machine's CPU:" in printed
    gains = [float(gain) for gain in re.findall(r"at most ([0-9.]+)x", printed)]
    assert all(gain > 1.1 for gain in gains)
    assert gains or "No module runs on a sparse kernel here" in printed


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        (4, "vLLM runs the int4 weights on kernels of its own."),
        (3, "vLLM has no kernel for int3 weights on a CPU."),
    ],
)
def test_dense_weights_of_few_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int, says: str
) -> None:
    grid = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 64,
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": grid}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    tensors = {
        "a.weight_packed": torch.zeros(64, 128 * bits // 32, dtype=torch.int32),
        "a.weight_scale": torch.ones(64, 2, dtype=torch.bfloat16),
        "a.weight_shape": torch.tensor([64, 128]),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    cli.app(["inspect", str(tmp_path)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert f"\n{says} With --quantization rac, on this machine's CPU:\na (64x128): " in printed
    assert (
        support().isa in (None, "portable")
        or f"int{bits} kernel {support().isa}: 0.{41 if bits == 3 else 53}" in printed
    )


def test_json_has_what_is_printed(rac, sparse_folder):
    code, stdout, _ = rac("inspect", sparse_folder, "--json")
    found = json.loads(stdout)
    assert (code, found["format"], found["sound"], found["sparsity"]) == (
        0,
        "sparse-24-bitmask",
        True,
        0.5,
    )
    rows = {row["name"]: row for row in found["modules"]}
    assert rows["model.layers.1.mlp.down_proj"]["structure"] == "2:4"
    assert found["run_record"]["calibration"]["tokens"] == 500
    served = {row["module"]: row for row in found["served"]}
    assert served["lm_head"]["sparse"] is False
    assert all(row["reason"] for row in found["served"])


def test_the_embedded_model_has_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(["inspect", "reasoner"], standalone_mode=False)
    assert "no matrix is recorded as pruned" in capsys.readouterr().out


def test_a_checkpoint_that_is_not_sound_ends_with_status_1(rac, sparse_folder, tmp_path) -> None:
    """A size of 2^62 is never planned with."""
    shutil.copytree(sparse_folder, tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.shape"].fill_(2**62)
    save_file(tensors, file, metadata={"format": "pt"})
    code, stdout, stderr = rac("inspect", tmp_path / "damaged")
    assert (code, "DAMAGED: model.layers.1.mlp.down_proj" in stdout) == (1, True)
    assert "not sound, see the notes of the table" in stderr
    code, stdout, _ = rac("inspect", tmp_path / "damaged", "--json")
    assert (code, json.loads(stdout)["sound"], json.loads(stdout)["served"]) == (1, False, [])


def test_control_characters_are_printed_escaped() -> None:
    row = matrix(structure="2:4\x1b[2K", problem="a\nforged line")
    record = {"base_model": "x\x1b]0;title\x07", "method": "m"}
    printed = render_report(report(row, run_record=record))
    assert printed.replace("\n", "").isprintable()
    assert "a\\nforged line" in printed
