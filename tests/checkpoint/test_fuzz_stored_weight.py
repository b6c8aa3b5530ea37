"""Mutated tensors through everything that happens between the file and the kernel: an error, or a
sound weight."""

from __future__ import annotations

import random

import pytest
import torch

from rac_modifier.checkpoint.formats import check, pack
from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.operator import sparse_linear
from rac_modifier.kernels.cpu.packed import pack_scale, pack_values
from rac_modifier.kernels.cpu.support import support
from tests.checkpoint.test_stored_weight import FORMATS, consistent, random_weight
from tests.kernels.cpu.kernel_helpers import Packed, unpacked

DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float32,
    torch.bfloat16,
    torch.bool,
    torch.float64,
]
EXTREMES = [0, 1, -1, 2, 255, 2**31 - 1, -(2**31), 2**32, 2**62, -(2**63), 2**63 - 1]


def mutate(tensors: dict[str, torch.Tensor], rng: random.Random) -> dict[str, torch.Tensor]:
    """One to three random mutations: bytes, numbers, lengths, shapes, dtypes, missing or swapped
    parts."""
    tensors = {part: tensor.clone() for part, tensor in tensors.items()}
    for _ in range(rng.randrange(1, 4)):
        if not tensors:
            break
        part = rng.choice(list(tensors))
        tensor = tensors[part]
        kind = rng.randrange(8)
        if kind == 0 and tensor.numel():
            data = (
                tensor.contiguous().view(-1).view(torch.uint8)
            )  # the bytes of `tensor` itself where it is contiguous
            data[rng.randrange(data.numel())] = rng.randrange(256)
        elif kind == 1 and tensor.dtype == torch.int64 and tensor.numel():
            tensor.reshape(-1)[rng.randrange(tensor.numel())] = rng.choice(EXTREMES)
        elif kind == 2:
            tensors[part] = tensor[: rng.randrange(len(tensor) + 1)] if tensor.dim() else tensor
        elif kind == 3:
            tensors[part] = torch.cat([tensor, tensor[:1]]) if tensor.dim() else tensor
        elif kind == 4:
            tensors[part] = rng.choice(
                [
                    tensor.flatten(),
                    tensor.transpose(0, -1) if tensor.dim() else tensor,
                    tensor[None],
                    tensor.reshape(-1, 1),
                ]
            )
        elif kind == 5:
            tensors[part] = tensor.to(rng.choice(DTYPES))
        elif kind == 6 and tensor.numel():  # bits move, counts stay
            flat = tensor.reshape(-1)
            tensors[part] = flat[torch.randperm(flat.numel())].view(tensor.shape)
        elif kind == 7 and rng.random() < 0.3:
            tensors.pop(part)
    return {part: tensor.contiguous() for part, tensor in tensors.items()}  # as a file gives them


def load(tensors: dict[str, torch.Tensor], format: str, rng: random.Random, native: bool) -> None:
    weight = check(tensors, format, "layer")
    assert consistent(weight)
    first = rng.randrange(weight.rows)
    count = rng.randrange(1, weight.columns + 1)
    cut = weight.select_rows(torch.arange(first, weight.rows)).select_columns(
        weight.columns - count, count
    )
    assert cut.dense().shape == (weight.rows - first, count)
    if native and weight.values.dtype in (torch.bfloat16, torch.float32, torch.int8):
        packed = pack_values(weight.values, weight.bitmask, (weight.rows, weight.columns))
        expected = weight.dense()
        actual = unpacked(Packed(packed, weight.rows, weight.columns))
        assert torch.equal(
            actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
        )
        if weight.scale is not None and (weight.scale.shape[1] == 1 or weight.group % 4 == 0):
            x = torch.randn(2, weight.columns)
            scale = pack_scale(weight.scale, weight.group)
            y = sparse_linear(x, packed, weight.rows, weight.columns, None, scale)
            if float(weight.scale.abs().max()) < 1:  # a flipped bit may make a scale that overflows
                torch.testing.assert_close(
                    y, x @ weight.dequantized(torch.float32).T, rtol=1e-2, atol=1.0
                )


def clean_parts(
    rows: int, columns: int, seed: int, format: str, bits: int | None
) -> dict[str, torch.Tensor]:
    """A sound weight: floats, or quantized to so many bits with scales."""
    weight = random_weight(
        rows, columns, seed, format == FORMATS[0], torch.float32 if bits else torch.bfloat16
    )
    if bits is None:
        return pack(weight, format, "layer")
    groups = 2 if bits == 4 and columns % 8 == 0 else 1
    most = (1 << (bits - 1)) - 1
    values = (weight * most / 4).round().clamp(-most, most).to(torch.int8)
    return {
        **pack(values, format, "layer", bits if bits == 4 else None),
        "weight_scale": torch.rand(rows, groups) / most,
    }


def fuzz(format: str, bits: int | None, cases: int) -> None:
    rng = random.Random(f"{format} {bits}")
    torch.manual_seed(0)
    native = support().isa is not None
    refused = unnamed = 0
    for case in range(cases):
        if case % 50 == 0:
            rows, columns = rng.randrange(1, 20), 4 * rng.randrange(1, 12)
            clean = clean_parts(rows, columns, case, format, bits)
        try:
            load(mutate(clean, rng), format, rng, native)
        except RacError as error:
            refused += 1
            unnamed += not str(error).startswith("layer.")
    assert unnamed == 0
    assert (
        cases // 3 < refused < cases
    )  # most mutations are seen, and some leave other, sound numbers


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_mutated_tensors(format, bits):
    fuzz(format, bits, 1000)
