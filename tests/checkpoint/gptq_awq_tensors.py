"""Random weights, and how GPTQ, AWQ and compressed-tensors write them, with Python's integers."""

from dataclasses import dataclass

import torch

_AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]  # of eight neighbours, from the lowest bits of a word on
# What GPTQModel subtracts from each word of zero points of 3 bits in format 1; copied from it.
_GPTQMODEL_3_BITS = [
    0b00100100100100100100100100100100,
    0b10010010010010010010010010010010,
    0b01001001001001001001001001001001,
]


@dataclass
class Rounded:
    """Codes [N, K], codes of zero and scales [N, groups], and the weight [N, K] that they mean."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scale: torch.Tensor
    bits: int

    @property
    def meant(self) -> torch.Tensor:
        rows, groups = self.scale.shape
        values = self.codes.view(rows, groups, -1) - self.zeros[:, :, None]
        return (values * self.scale[:, :, None]).view(rows, -1).float()


def drawn(rows: int, columns: int, group: int | None, symmetric: bool, bits: int = 4) -> Rounded:
    """Random codes and codes of zero; scales are exact in float16."""
    groups = columns // (group or columns)
    codes = torch.randint(0, 1 << bits, (rows, columns))
    zeros = torch.randint(0, 1 << bits, (rows, groups))
    if symmetric:
        zeros = torch.full_like(zeros, 1 << (bits - 1))
    return Rounded(codes, zeros, (torch.rand(rows, groups) + 0.5).half().float(), bits)


def rounded(weight: torch.Tensor, group: int | None, symmetric: bool, bits: int = 4) -> Rounded:
    """A weight [N, K] to the nearest codes, with scales exact in float16."""
    rows, columns = weight.shape
    parts = weight.float().view(rows, -1, group or columns)
    most = (1 << bits) - 1
    if symmetric:
        scale = parts.abs().amax(-1) * 2 / most
        zeros = torch.full_like(scale, 1 << (bits - 1))
    else:
        low, high = parts.amin(-1).clamp_max(0), parts.amax(-1).clamp_min(0)
        scale = (high - low) / most
    scale = scale.clamp_min(1e-3).half().float()
    if not symmetric:
        zeros = (-low / scale).round().clamp(0, most)
    codes = (parts / scale[..., None] + zeros[..., None]).round().clamp(0, most)
    return Rounded(codes.view(rows, columns).long(), zeros.long(), scale, bits)


def words(lines: torch.Tensor, bits: int) -> torch.Tensor:
    """Lines of codes as int32, the first in the lowest bits; some of 3 bits lie in two words."""
    packed = []
    for line in lines.tolist():
        number = sum(code << bits * i for i, code in enumerate(line))
        packed.append([number >> 32 * at & 0xFFFFFFFF for at in range(-(-len(line) * bits // 32))])
    return _int32(packed)


def minus_one(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """The words of codes of zero less one each, subtracted from whole words as by GPTQModel."""
    ones = [sum(1 << at for at in range(0, 32, bits))] if bits != 3 else _GPTQMODEL_3_BITS
    actual = words(zeros, bits).tolist()
    return _int32(
        [
            [(word - ones[i % len(ones)]) & 0xFFFFFFFF for i, word in enumerate(line)]
            for line in actual
        ]
    )


def gptq(
    weight: Rounded, version: int = 1, order: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """The tensors on disk. `order` [K]: where the columns of `weight` stand in the checkpoint's."""
    codes, columns = weight.codes, weight.codes.shape[1]
    index = torch.arange(columns) // (columns // weight.scale.shape[1])
    if order is not None:
        codes, index = torch.empty_like(codes), torch.empty_like(index)
        codes[:, order] = weight.codes
        index[order] = torch.arange(columns) // (columns // weight.scale.shape[1])
    by_group = weight.zeros.T
    return {
        "qweight": words(codes, weight.bits).T.contiguous(),
        "qzeros": words(by_group, weight.bits)
        if version == 2
        else minus_one(by_group, weight.bits),
        "scales": weight.scale.T.contiguous().half(),
        "g_idx": index.int(),
    }


def awq(weight: Rounded) -> dict[str, torch.Tensor]:
    """The tensors on disk, as AutoAWQ's version gemm."""
    return {
        "qweight": words(_interleaved(weight.codes.T), 4),
        "qzeros": words(_interleaved(weight.zeros.T), 4),
        "scales": weight.scale.T.contiguous().half(),
    }


def pack_quantized(weight: Rounded, symmetric: bool) -> dict[str, torch.Tensor]:
    """The tensors on disk, as compressed-tensors'."""
    tensors = {
        "weight_packed": words(weight.codes, weight.bits),
        "weight_scale": weight.scale,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(weight.zeros.T, weight.bits).T.contiguous()
    return tensors


def _interleaved(lines: torch.Tensor) -> torch.Tensor:
    count = lines.shape[1]
    return lines[:, [first + at for first in range(0, count, 8) for at in _AWQ_COLUMNS]]


def _int32(numbers: list[list[int]]) -> torch.Tensor:
    return torch.tensor(
        [[n - (1 << 32) if n >> 31 else n for n in line] for line in numbers], dtype=torch.int32
    )
