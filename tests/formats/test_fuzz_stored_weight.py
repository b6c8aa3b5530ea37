"""Mutated tensors between the file and the kernel: a named error, or a sound weight."""

import random

import pytest
import torch

from rac_modifier.checkpoint.formats import FORMATS
from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import pack_values
from rac_modifier.kernels.cpu.support import support
from tests.formats.test_stored_weight import consistent, random_weight
from tests.kernels.cpu.kernel_helpers import Packed, unpacked

CASES = 400
DTYPES = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.bool]
EXTREMES = [0, 1, -1, 255, 2**31 - 1, -(2**31), 2**32, 2**62, -(2**63), 2**63 - 1]
Parts = dict[str, torch.Tensor]


def mutated(tensors: Parts, rng: random.Random) -> Parts:
    """Change a byte, a number, the length, the shape, the dtype or the order of a part."""
    part = rng.choice(list(tensors))
    tensor = tensors[part].clone().contiguous()
    kind = rng.randrange(6)
    if kind == 0:
        tensor.view(-1).view(torch.uint8)[rng.randrange(tensor.nbytes)] = rng.randrange(256)
    elif kind == 1 and tensor.dtype == torch.int64:
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice(EXTREMES)
    elif kind == 2:
        tensor = torch.cat([tensor, tensor])[: rng.randrange(2 * len(tensor))]
    elif kind == 3:
        tensor = rng.choice([tensor.flatten(), tensor.transpose(0, -1), tensor[None]])
    elif kind == 4:
        tensor = tensor.to(rng.choice(DTYPES))
    else:
        tensor = tensor.view(-1)[torch.randperm(tensor.numel())].view(tensor.shape)
    return {**tensors, part: tensor.contiguous()}


def clean_parts(rng: random.Random, seed: int, format: str, bits: int | None) -> Parts:
    """A sound weight: floats, or quantized to so many bits with scales."""
    rows, columns = rng.randrange(1, 20), 4 * rng.randrange(1, 12)
    weight = random_weight(rows, columns, seed, format == "sparse-24-bitmask", torch.float32)
    if bits is None:
        return FORMATS[format].compress(weight.bfloat16(), "layer")
    most = (1 << (bits - 1)) - 1
    values = (weight * most / 4).round().clamp(-most, most).to(torch.int8)
    parts = FORMATS[format].compress(values, "layer", bits if bits == 4 else None)
    return {**parts, "weight_scale": torch.rand(rows, 1) / most + 0.01}


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_mutated_tensors(format, bits):
    rng = random.Random(f"{format} {bits}")
    torch.manual_seed(0)
    refused = unnamed = 0
    for case in range(CASES):
        if case % 50 == 0:
            clean = clean_parts(rng, case, format, bits)
        try:
            weight = FORMATS[format].check(mutated(clean, rng), "layer")
        except RacError as error:
            unnamed += not str(error).startswith("layer.")
            refused += 1
            continue
        assert consistent(weight)
        if support().isa is not None:
            packed = pack_values(weight.values, weight.bitmask, weight.shape)
            actual = unpacked(Packed(packed, weight.rows, weight.columns)).contiguous()
            expected = weight.dense().view(torch.uint8)
            assert torch.equal(actual.view(torch.uint8), expected)
    assert unnamed == 0
    assert CASES // 3 < refused < CASES
