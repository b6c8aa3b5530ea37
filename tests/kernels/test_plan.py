"""The decisions for a whole checkpoint, ahead of serving."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier.checkpoint.formats import FORMATS
from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.kernels import cpu
from rac_modifier.kernels.choose import PlanRow, plan_checkpoint, render_plan
from rac_modifier.kernels.cpu.support import Support
from tests.checkpoint.gptq_awq_tensors import drawn, gptq
from tests.formats.test_stored_weight import random_weight


@pytest.fixture(autouse=True)
def avx2(monkeypatch) -> None:
    """A machine with AVX2."""
    monkeypatch.setattr(cpu, "machine_support", lambda: Support("avx2", "a test's"))


def plan(folder: Path) -> list[PlanRow]:
    report, rows = plan_checkpoint(folder)
    assert report.sound
    return rows


def test_a_packed_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    names = ["layers.0.down_proj", "layers.0.up_proj", "layers.0.gate"]
    tensors = {f"{n}.weight": random_weight(32, 64, i, True) for i, n in enumerate(names)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    pack_checkpoint(tmp_path, dict.fromkeys(names[:2], "2:4"), dense_linears=names[2:])
    rows = plan(tmp_path)
    assert [(row.module, row.decision.sparse) for row in rows] == [(n, True) for n in names[:2]]
    assert rows[0].decision.bytes_per_weight == pytest.approx(1.125)
    assert render_plan(rows) == (
        "2 modules, from layers.0.down_proj (32x64): sparse kernel avx2: 1.12 bytes per "
        "weight instead of the 2 of dense bfloat16, at most 1.78x faster"
    )


def saved(folder: Path, tensors: dict[str, Any], format: str) -> Path:
    """A packed module "a"."""
    named = {f"a.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    entry = {"quant_method": "compressed-tensors", "sparsity_config": {"format": format}}
    entry["config_groups"] = {"g": {"weights": {"type": "int"}}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": entry}))
    return folder


@pytest.mark.parametrize(
    ("bits", "groups", "two_of_four", "kernel"),
    [
        (8, 1, True, "sparse int8 kernel avx2"),
        (4, 1, False, "sparse int4 kernel avx2"),
        (4, 11, True, "sparse int8 kernel avx2 (int4 values in groups of 4, one byte each)"),
        (4, 22, False, "dense"),
    ],
)
def test_quantized_weights(tmp_path, two_of_four, bits, groups, kernel):
    format = "sparse-24-bitmask" if two_of_four else "sparse-bitmask"
    weight = random_weight(32, 44, 0, two_of_four, torch.float32).mul(3).round().clamp(-7, 7)
    parts = FORMATS[format].compress(weight.to(torch.int8), "a", bits if bits == 4 else None)
    folder = saved(tmp_path, {**parts, "weight_scale": torch.ones(32, groups)}, format)
    (row,) = plan(folder)
    assert row.decision.kernel == kernel
    stored = int((weight != 0).sum()) if not two_of_four else 32 * 22
    assert stored <= row.layer.density * 32 * 44 < stored + 8


def test_scales_per_block_have_no_sparse_kernel(tmp_path):
    """Packed by an older version."""
    weight = random_weight(160, 128, 0, False).to(torch.float8_e4m3fn)
    parts = FORMATS["sparse-bitmask"].compress(weight, "a")
    folder = saved(tmp_path, {**parts, "weight_scale": torch.ones(2, 1)}, "sparse-bitmask")
    config = json.loads((folder / "config.json").read_text())
    weights = {"type": "float", "strategy": "block"}
    config["quantization_config"]["config_groups"] = {"g": {"weights": weights}}
    (folder / "config.json").write_text(json.dumps(config))
    (row,) = plan(folder)
    assert row.decision.reason.startswith("refused by vLLM because its scales are per block")


def test_dense_codes(tmp_path):
    """Groups of 64 columns with a bfloat16 scale; reordered ones, and 8 bits but in a head, have no
    kernel."""
    tensors = {}
    widths = {"a": 16, "reordered": 16, "eight_bits": 32, "three": 12, "lm_head": 32}
    for name, words in widths.items():
        tensors[f"{name}.weight_packed"] = torch.zeros(64, words, dtype=torch.int32)
        tensors[f"{name}.weight_scale"] = torch.ones(64, 2, dtype=torch.bfloat16)
        tensors[f"{name}.weight_shape"] = torch.tensor([64, 128])
    tensors["reordered.weight_g_idx"] = torch.zeros(128, dtype=torch.int32)
    save_file(tensors, tmp_path / "model.safetensors")
    weights = {"strategy": "group", "group_size": 64}
    groups = {str(bits): {"weights": {"num_bits": bits, **weights}} for bits in (3, 4, 8)}
    entry = {"format": "pack-quantized", "config_groups": groups}
    record = {"int8_activations": ["three"]}
    config = {"rac_sparsity": record, "quantization_config": entry}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = {row.module: row for row in plan(tmp_path)}
    assert rows.keys() == {"a", "three", "lm_head"}
    assert [rows[name].layer.activation_bits for name in ("a", "three")] == [16, 8]
    for name, bits in (("a", 4), ("three", 3), ("lm_head", 8)):
        assert rows[name].decision.bytes_per_weight == bits / 8 + 2 / 64
        assert rows[name].decision.reason.startswith(f"int{bits} kernel avx2")


INT8_INPUTS = {"input_activations": {"num_bits": 8, "strategy": "token"}}
ROTATED = {"config_groups": {"r": {"type": "hadamard", "apply": []}}}


@pytest.mark.parametrize(
    ("module", "bits", "scheme", "transforms", "reason"),
    [
        ("a", 4, INT8_INPUTS, None, "its activations are quantized too"),
        ("lm_head", 3, {}, None, "its weights are int3"),
        ("lm_head", 2, {}, None, "its weights are int2"),
        ("a", 4, {}, ROTATED, "its inputs or outputs are transformed"),
    ],
)
def test_what_vllm_runs_itself(tmp_path, module, bits, scheme, transforms, reason):
    weights = {"num_bits": bits, "strategy": "group", "group_size": 64}
    tensors = {
        f"{module}.weight_packed": torch.zeros(64, 128 * bits // 32, dtype=torch.int32),
        f"{module}.weight_scale": torch.ones(64, 2),
        f"{module}.weight_shape": torch.tensor([64, 128]),
    }
    entry = {
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": weights, **scheme}},
        "transform_config": transforms,
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    (row,) = plan(tmp_path)
    assert not row.decision.sparse
    assert row.decision.reason == f"vLLM's own method because {reason}"


def test_experts_with_reordered_columns_run_dense(tmp_path):
    names, tensors = ("a.q_proj", "a.experts.0.up_proj"), {}
    for name in names:
        stored = gptq(drawn(64, 128, 64, True), 1, torch.randperm(128))
        tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
    entry = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": True}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": entry}))
    reasons = {row.module: row.decision.reason for row in plan(tmp_path)}
    assert reasons["a.q_proj"].startswith("int4 kernel avx2")
    assert reasons["a.experts.0.up_proj"] == "dense because its columns are reordered (desc_act)"
