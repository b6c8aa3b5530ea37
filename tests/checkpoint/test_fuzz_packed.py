"""Random damage to packed files: an error that says so or other numbers, never a crash, a hang or another exception."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from rac_modifier.checkpoint.bitmask import pack_24, pack_unstructured
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import dense_tensors

CASES = 400


def packed_file(structure: str) -> bytes:
    torch.manual_seed(0)
    weight = torch.randn(6, 20).bfloat16()
    weight.view(-1, 4)[:, ::2] = 0
    parts = (pack_24 if structure == "2:4" else pack_unstructured)(weight)
    tensors = {f"layer.{part}": tensor for part, tensor in parts.items()} | {
        "norm.weight": torch.ones(4)
    }
    return save(tensors, metadata={"format": "pt"})


def damage(data: bytes, rng: random.Random) -> bytes:
    mutable = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(mutable[: rng.randrange(len(mutable))])
    if kind == 1:
        return bytes(mutable) + rng.randbytes(rng.randrange(1, 40))
    if kind == 2:  # a digit of the header: shapes and offsets
        digits = [i for i in range(8, header) if chr(mutable[i]).isdigit()]
        for position in rng.choices(digits, k=rng.randrange(1, 3)):
            mutable[position] = ord(rng.choice("0123456789"))
    else:
        start, stop = {3: (0, header), 4: (header, len(mutable)), 5: (0, len(mutable))}[kind]
        for _ in range(rng.randrange(1, 6)):
            mutable[rng.randrange(start, stop)] = rng.randrange(256)
    return bytes(mutable)


@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_damaged_files(tmp_path: Path, structure: str) -> None:
    format = "sparse-24-bitmask" if structure == "2:4" else "sparse-bitmask"
    (tmp_path / "config.json").write_text(
        f'{{"quantization_config": {{"sparsity_config": {{"format": "{format}"}}}}}}'
    )
    data = packed_file(structure)
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert dense_tensors(tmp_path).keys() == {"layer.weight", "norm.weight"}
    rng = random.Random(structure)
    refused = 0
    for _ in range(CASES):
        path.unlink()  # a new file each time: the old one may still be mapped
        path.write_bytes(damage(data, rng))
        try:
            for tensor in dense_tensors(tmp_path).values():
                assert tensor.numel() <= 8 * len(data)
        except RacError:
            refused += 1
        with contextlib.suppress(RacError):
            inspect_checkpoint(tmp_path)
    assert CASES // 2 < refused < CASES
