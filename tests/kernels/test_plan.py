"""The decisions for a whole checkpoint, ahead of serving."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier.checkpoint.formats import pack
from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint
from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import backend
from rac_modifier.kernels.cpu.support import Support
from rac_modifier.kernels.interface import Layer
from rac_modifier.kernels.plan import plan_checkpoint, plan_dense_codes, plan_row, render_plan
from tests.checkpoint.test_stored_weight import random_weight

AVX2 = Support("avx2", "a test's")
NONE = Support(None, "no compiled kernel: a test's")


@pytest.fixture(autouse=True)
def support(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with AVX2, unless a test's parameters say otherwise."""
    found = (
        request.node.callspec.params.get("machine", AVX2)
        if hasattr(request.node, "callspec")
        else AVX2
    )
    monkeypatch.setattr(backend, "support", lambda: found)


@pytest.mark.parametrize(
    ("stored", "dtype", "machine", "reason"),
    [
        (64 * 128 // 2, torch.bfloat16, AVX2, "sparse kernel avx2"),
        (64 * 128, torch.bfloat16, AVX2, "dense because packed it takes"),
        (64 * 128 // 2, torch.bfloat16, NONE, "dense because no compiled kernel"),
        (
            64 * 128 // 2,
            torch.int8,
            AVX2,
            r"sparse int8 kernel avx2: 0.62 bytes per weight instead of the 2 .* 3.20x",
        ),
        (
            64 * 128 // 2,
            torch.int32,
            AVX2,
            r"sparse int4 kernel avx2: 0.38 bytes per weight instead of the 2 .* 5.28x",
        ),
        (
            64 * 128 // 2,
            torch.float8_e4m3fn,
            AVX2,
            r"sparse kernel avx2 \(fp8 values as bfloat16, exactly\): 1.12",
        ),
        (64 * 128 // 2, torch.int8, NONE, "dense because no compiled kernel"),
    ],
)
def test_plan_row(stored, dtype, machine, reason):
    layer = Layer(64, 128, stored / (64 * 128), dtype, torch.bfloat16, 128)
    row = plan_row("a", layer)
    assert row.decision.sparse == reason.startswith("sparse")
    assert row.density == stored / (64 * 128)
    assert re.match(reason, row.decision.reason)


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


def test_plan_of_a_packed_checkpoint(tmp_path):
    rows = plan_checkpoint(checkpoint(tmp_path / "m", True))
    assert [(row.module, row.decision.sparse) for row in rows] == [
        ("model.layers.0.mlp.down_proj", True),
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.0.mlp.gate", False),
    ]
    assert [row.density for row in rows] == [0.5, 0.5, 1.0]
    assert rows[0].decision.bytes_per_weight == pytest.approx(1.125)
    table = render_plan(rows)
    assert "sparse kernel avx2" in table
    assert "dense because it is not pruned (in ignore)" in table
    served_in_fp32 = plan_checkpoint(tmp_path / "m", torch.float32)
    assert served_in_fp32[0].decision.bytes_per_weight == pytest.approx(
        1.125
    )  # bf16 values stay bf16


@pytest.mark.parametrize(
    ("bits", "groups", "kernel"),
    [
        (8, 1, "sparse int8 kernel avx2"),
        (4, 1, "sparse int4 kernel avx2"),
        (4, 11, "sparse int8 kernel avx2 (int4 values in groups of 4, one byte each)"),
        (4, 22, "sparse kernel avx2 (int4 values in groups of 2, rounded to bfloat16)"),
    ],
)
@pytest.mark.parametrize("two_of_four", [True, False])
def test_plan_of_quantized_weights(tmp_path, two_of_four, bits, groups, kernel):
    format = "sparse-24-bitmask" if two_of_four else "sparse-bitmask"
    weight = (
        random_weight(32, 44, 0, two_of_four, torch.float32)
        .mul(3)
        .round()
        .clamp(-7, 7)
        .to(torch.int8)
    )
    parts = {
        **pack(weight, format, "a", bits if bits == 4 else None),
        "weight_scale": torch.ones(32, groups),
    }
    save_file(
        {f"a.{name}": tensor for name, tensor in parts.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    config = {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "sparsity_config": {"format": format},
        }
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (row,) = plan_checkpoint(tmp_path)
    assert row.decision.kernel == kernel
    stored = int((weight != 0).sum()) if not two_of_four else 32 * 22
    assert stored <= row.density * 32 * 44 < stored + 8


@pytest.mark.parametrize(
    ("scales", "size"), [(torch.bfloat16, 0.25 + 0.125 + 2 / 128), (torch.float32, 0.375 + 4 / 128)]
)
def test_scales_count_with_the_bytes_that_they_are_stored_in(tmp_path, scales, size):
    weight = (
        random_weight(32, 256, 0, True, torch.float32).mul(3).round().clamp(-7, 7).to(torch.int8)
    )
    parts = {
        **pack(weight, "sparse-24-bitmask", "a", 4),
        "weight_scale": torch.ones(32, 2, dtype=scales),
    }
    save_file(
        {f"a.{name}": tensor for name, tensor in parts.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    format = {"format": "sparse-24-bitmask"}
    config = {
        "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": format}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (row,) = plan_checkpoint(tmp_path)
    odd_quads = (
        0.5 / (16 * 4) / 2
    )  # half a byte of padding in every second block of 16 rows and 4 columns
    assert row.decision.bytes_per_weight == pytest.approx(size + odd_quads)


def test_plan_of_dense_stored_weights_says_how_to_serve_them_sparse(tmp_path):
    rows = plan_checkpoint(checkpoint(tmp_path / "m", False))
    assert [row.module for row in rows] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.up_proj",
    ]
    assert {row.decision.reason for row in rows} == {
        "dense because it is stored dense; serve with --quantization rac"
    }


@pytest.mark.parametrize(
    "shape", [torch.tensor([[0], [64]]), torch.tensor([[1], [2]]), torch.zeros(2, 1)]
)
def test_plan_of_a_damaged_checkpoint(tmp_path, shape):
    from safetensors.torch import load_file

    folder = checkpoint(tmp_path / "m", True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.shape"] = shape
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RacError, match=r"down_proj\.shape: does not fit"):
        plan_checkpoint(folder)


def test_dense_codes_modules_would_run_on_the_int4_kernel(tmp_path):
    """Groups of 64 columns, a bfloat16 scale each: half a byte and 2 / 64. What the kernel does not read is named or left out."""
    tensors = {}
    for name, words in (("a", 16), ("reordered", 16), ("eight_bits", 32)):
        tensors[f"{name}.weight_packed"] = torch.zeros(64, words, dtype=torch.int32)
        tensors[f"{name}.weight_scale"] = torch.ones(64, 2, dtype=torch.bfloat16)
        tensors[f"{name}.weight_shape"] = torch.tensor([64, 128])
    tensors |= {
        "three.weight_packed": torch.zeros(64, 12, dtype=torch.int32),
        "three.weight_scale": torch.ones(64, 2, dtype=torch.bfloat16),
        "three.weight_shape": torch.tensor([64, 128]),
    }
    tensors["reordered.weight_g_idx"] = torch.zeros(128, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"rac_sparsity": {"int8_activations": ["three"]}})
    )
    found = {row.module: row for row in plan_dense_codes(tmp_path)}
    assert [found[name].layer.activation_bits for name in ("a", "three")] == [16, 8]
    assert found.keys() == {"a", "reordered", "three"}
    assert (found["a"].rows, found["a"].columns, found["a"].density) == (64, 128, 1.0)
    assert found["a"].decision.bytes_per_weight == 0.5 + 2 / 64
    assert found["a"].decision.reason.startswith("int4 kernel avx2")
    assert found["three"].decision.bytes_per_weight == 0.375 + 2 / 64
    assert found["three"].decision.reason.startswith("int3 kernel avx2")
    assert (
        found["reordered"].decision.reason
        == "dense because its columns were reordered (actorder: group)"
    )
