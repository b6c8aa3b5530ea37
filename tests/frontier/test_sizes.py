"""Bytes by what they hold, against sums that are written down here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rac_modifier.frontier.sizes import checkpoint_bytes


def test_every_tensor_is_counted_once_and_in_its_place(tmp_path: Path) -> None:
    bf16 = torch.bfloat16
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 4, dtype=bf16),  # 80
        "lm_head.weight": torch.zeros(10, 4, dtype=bf16),  # 80
        "model.norm.weight": torch.zeros(4, dtype=bf16),  # 8
        "model.layers.0.a.weight": torch.zeros(4, 8, dtype=bf16),  # 64, 32 weights
        "model.layers.0.a.bias": torch.zeros(4, dtype=bf16),  # 8
        "model.layers.0.b.compressed": torch.zeros(7, dtype=bf16),  # 14
        "model.layers.0.b.bitmask": torch.zeros(4, 1, dtype=torch.uint8),  # 4
        "model.layers.0.b.row_offsets": torch.zeros(5, dtype=torch.int32),  # 20
        "model.layers.0.b.shape": torch.tensor([4, 8]),  # 16, 32 weights
        "model.layers.0.c.weight_packed": torch.zeros(4, 1, dtype=torch.int32),  # 16
        "model.layers.0.c.weight_shape": torch.tensor([4, 8]),  # 16, 32 weights
        "model.layers.0.c.weight_scale": torch.zeros(4, 2, dtype=bf16),  # 16
        "model.layers.0.c.weight_zero_point": torch.zeros(1, 2, dtype=torch.int32),  # 8
        "model.layers.0.c.weight_g_idx": torch.zeros(8, dtype=torch.int32),  # 32
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert checkpoint_bytes(tmp_path) == {
        "values": 64 + 14 + 16,
        "bitmask": 4,
        "offsets": 20,
        "scales": 16,
        "zero_points": 8,
        "order": 32,
        "head": 80,
        "embeddings": 80,
        "other": 8 + 8 + 16 + 16,
        "matrices": 94 + 4 + 20 + 16 + 8 + 32,
        "total": 174 + 80 + 80 + 48,
        "bits_per_weight": pytest.approx(8 * 174 / 96),
    }
    assert checkpoint_bytes(tmp_path)["total"] == sum(tensor.nbytes for tensor in tensors.values())


def test_a_checkpoint_without_matrices(tmp_path: Path) -> None:
    save_file({"norm.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert checkpoint_bytes(tmp_path)["bits_per_weight"] == 0
