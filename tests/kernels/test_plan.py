"""The decisions for a whole checkpoint, ahead of serving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rac_modifier.checkpoint.formats import pack
from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint
from rac_modifier.errors import RacError
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu.support import Support
from rac_modifier.kernels.plan import plan_checkpoint, plan_dense_codes, render_plan
from tests.checkpoint.test_stored_weight import random_weight


@pytest.fixture(autouse=True)
def avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with AVX2."""
    monkeypatch.setattr(cpu, "machine_support", lambda: Support("avx2", "a test's"))


def checkpoint(folder: Path, packed: bool) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    tensors = {
        f"model.layers.0.{name}.weight": random_weight(32, 64, seed, True)
        for seed, name in enumerate(["mlp.down_proj", "mlp.up_proj", "mlp.gate"])
    }
    save_file(
        tensors | {"model.norm.weight": torch.ones(64)},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    pruned = {"model.layers.0.mlp.down_proj": "2:4", "model.layers.0.mlp.up_proj": "2:4"}
    if packed:
        pack_checkpoint(folder, pruned, dense_linears=["model.layers.0.mlp.gate", "lm_head"])
    else:
        mark_dense(folder, pruned)
    return folder


def test_a_packed_checkpoint(tmp_path):
    rows = plan_checkpoint(checkpoint(tmp_path / "m", True))
    assert [(row.module, row.decision.sparse) for row in rows] == [
        ("model.layers.0.mlp.down_proj", True),
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.gate", False),
    ]
    assert rows[0].decision.bytes_per_weight == pytest.approx(1.125)
    assert render_plan(rows).splitlines() == [
        "2 modules, from model.layers.0.mlp.down_proj (32x64): sparse kernel avx2: 1.12 bytes per "
        "weight instead of the 2 of dense bfloat16, at most 1.78x faster",
        "model.layers.0.mlp.gate (32x64): dense because it is not pruned (in ignore)",
    ]


def saved(folder: Path, tensors: dict[str, Any], format: str) -> Path:
    """A packed module "a"."""
    named = {f"a.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    entry = {"quant_method": "compressed-tensors", "sparsity_config": {"format": format}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    return folder


@pytest.mark.parametrize(
    ("bits", "groups", "two_of_four", "kernel"),
    [
        (8, 1, True, "sparse int8 kernel avx2"),
        (4, 1, False, "sparse int4 kernel avx2"),
        (4, 11, True, "sparse int8 kernel avx2 (int4 values in groups of 4, one byte each)"),
        (4, 22, False, "sparse kernel avx2 (int4 values in groups of 2, rounded to bfloat16)"),
    ],
)
def test_quantized_weights(tmp_path, two_of_four, bits, groups, kernel):
    format = "sparse-24-bitmask" if two_of_four else "sparse-bitmask"
    weight = random_weight(32, 44, 0, two_of_four, torch.float32).mul(3).round().clamp(-7, 7)
    parts = pack(weight.to(torch.int8), format, "a", bits if bits == 4 else None)
    folder = saved(tmp_path, {**parts, "weight_scale": torch.ones(32, groups)}, format)
    (row,) = plan_checkpoint(folder)
    assert row.decision.kernel == kernel
    stored = int((weight != 0).sum()) if not two_of_four else 32 * 22
    assert stored <= row.layer.density * 32 * 44 < stored + 8


@pytest.mark.parametrize(("scales", "scale_bytes"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_scales_count_with_the_bytes_that_they_are_stored_in(tmp_path, scales, scale_bytes):
    weight = random_weight(32, 256, 0, True, torch.float32).mul(3).round().clamp(-7, 7)
    parts = pack(weight.to(torch.int8), "sparse-24-bitmask", "a", 4)
    scale = torch.ones(32, 2, dtype=scales)
    folder = saved(tmp_path, {**parts, "weight_scale": scale}, "sparse-24-bitmask")
    (row,) = plan_checkpoint(folder)
    odd_quads = 0.5 / (16 * 4) / 2  # half a byte in every second block of 16 rows and 4 columns
    size = 0.25 + 0.125 + scale_bytes / 128 + odd_quads
    assert row.decision.bytes_per_weight == pytest.approx(size)


def test_dense_stored_weights_say_how_to_serve_them_sparse(tmp_path):
    rows = plan_checkpoint(checkpoint(tmp_path / "m", False))
    assert [row.module.rpartition(".")[2] for row in rows] == ["down_proj", "up_proj"]
    reason = "dense because it is stored dense; serve with --quantization rac"
    assert {row.decision.reason for row in rows} == {reason}


@pytest.mark.parametrize(
    "shape", [torch.tensor([[0], [64]]), torch.tensor([[1], [2]]), torch.zeros(2, 1)]
)
def test_a_damaged_checkpoint(tmp_path, shape):
    folder = checkpoint(tmp_path / "m", True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.shape"] = shape
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RacError, match=r"down_proj\.shape: does not fit"):
        plan_checkpoint(folder)


def test_dense_codes(tmp_path):
    """Groups of 64 columns with a bfloat16 scale."""
    tensors = {}
    for name, words in (("a", 16), ("reordered", 16), ("eight_bits", 32), ("three", 12)):
        tensors[f"{name}.weight_packed"] = torch.zeros(64, words, dtype=torch.int32)
        tensors[f"{name}.weight_scale"] = torch.ones(64, 2, dtype=torch.bfloat16)
        tensors[f"{name}.weight_shape"] = torch.tensor([64, 128])
    tensors["reordered.weight_g_idx"] = torch.zeros(128, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    record = {"rac_sparsity": {"int8_activations": ["three"]}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    rows = {row.module: row for row in plan_dense_codes(tmp_path)}
    assert rows.keys() == {"a", "reordered", "three"}
    assert [rows[name].layer.activation_bits for name in ("a", "three")] == [16, 8]
    assert (rows["a"].rows, rows["a"].columns, rows["a"].layer.density) == (64, 128, 1.0)
    for name, bits in (("a", 4), ("three", 3)):
        assert rows[name].decision.bytes_per_weight == bits / 8 + 2 / 64
        assert rows[name].decision.reason.startswith(f"int{bits} kernel avx2")
    reason = "dense because its columns were reordered (actorder: group)"
    assert rows["reordered"].decision.reason == reason
