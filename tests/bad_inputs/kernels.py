"""Mistakes about int4 weights: what the kernels refuse, and dense checkpoints of few bits whose parts do not fit each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.bad_inputs.bench import Bench, Cases

CASES = Cases()


def needs_kernels() -> None:
    """Skip the case where the kernels are not compiled."""
    from rac_modifier.kernels.cpu.support import support

    if support().isa is None:
        pytest.skip(support().reason)


def pack(fill: int = 7, bits: int = 4, zeros: Tensor | None = None) -> Tensor:
    """A packed int8 matrix [16, 64] of one value."""
    from rac_modifier.kernels.cpu.packed import pack_dense

    needs_kernels()
    return pack_dense(torch.full((16, 64), fill, dtype=torch.int8), bits, zeros)


def multiply(data: Tensor, scale: Tensor | None) -> None:
    """A product with a packed weight [16, 64]."""
    from rac_modifier.kernels.cpu.operator import sparse_linear

    sparse_linear(torch.ones(1, 64), data, 16, 64, None, scale)


def scales(groups: int) -> Tensor:
    from rac_modifier.kernels.cpu.packed import pack_scale

    return pack_scale(torch.ones(16, groups))


@CASES.case(
    "`RAC_KERNEL` of an instruction set that is not known",
    'RAC_KERNEL="sse": this machine runs portable',
)
def _(b: Bench) -> None:
    from rac_modifier.kernels.cpu import support

    b.monkeypatch.setenv("RAC_KERNEL", "sse")
    support.support.__wrapped__()


@CASES.case(
    "a value that does not fit four bits",
    "values: one of them does not fit 4 bits, 0 to 15 with its code",
)
def _(b: Bench) -> None:
    pack(8)


@CASES.case("a code of zero above 15", "a code of zero is 16, more than 15")
def _(b: Bench) -> None:
    pack(-8, zeros=torch.full((16, 1), 16, dtype=torch.uint8))


@CASES.case(
    "codes of zero of another dtype",
    "zeros: torch.int8 [16, 2]; codes of a weight [16, 64]",
)
def _(b: Bench) -> None:
    pack(zeros=torch.full((16, 2), 8, dtype=torch.int8))


@CASES.case(
    "codes of zero of an int8 weight",
    "zeros: torch.uint8 [16, 1]; codes of a weight [16, 64]",
)
def _(b: Bench) -> None:
    pack(bits=8, zeros=torch.full((16, 1), 8, dtype=torch.uint8))


@CASES.case("codes of zero in groups of 4 columns", "1024 values for a weight [16, 64]: impossible")
def _(b: Bench) -> None:
    pack(-8, zeros=torch.full((16, 16), 8, dtype=torch.uint8))


@CASES.case("an int4 weight without scales", "scale: missing, a weight of integers needs one")
def _(b: Bench) -> None:
    multiply(pack(), None)


@CASES.case(
    "int4 scales in groups of 4 columns",
    "groups of 4 columns; they must have a multiple of 8, at most 512",
)
def _(b: Bench) -> None:
    multiply(pack(), scales(16))


@CASES.case(
    "int4 scales in other groups than the codes of zero",
    "1 groups, where the weight's zeros have 2",
)
def _(b: Bench) -> None:
    multiply(pack(-8, zeros=torch.full((16, 2), 8, dtype=torch.uint8)), scales(1))


@CASES.case(
    "int4 scales that do not divide the columns",
    "does not fit a weight [16, 64]; pass what `pack_scale` returned",
)
def _(b: Bench) -> None:
    multiply(pack(), scales(5))


@CASES.case("bfloat16 scales of an int8 weight", "scale: an 8-bit weight needs one in fp32")
def _(b: Bench) -> None:
    multiply(pack(bits=8), scales(1).bfloat16())


@CASES.case(
    "a packed int4 weight that was changed", "panel 1: its offset is not that of a dense weight"
)
def _(b: Bench) -> None:
    from rac_modifier.kernels.cpu.packed import check_packed

    data = pack()
    data[72] += 1
    check_packed(data, 16, 64, torch.int8, masked=False, bits=4)


def check(symmetric: bool = False, group: int | None = 32, **changes: Tensor | None) -> None:
    """Read a dense int4 weight [16, 64] of a checkpoint, with some of its parts replaced; None: left out."""
    from rac_modifier.checkpoint.dense_codes import check_codes

    parts: dict[str, Tensor | None] = {
        "weight_packed": torch.zeros(16, 8, dtype=torch.int32),
        "weight_scale": torch.ones(16, 2),
        "weight_shape": torch.tensor([16, 64]),
        "weight_zero_point": torch.zeros(2, 2, dtype=torch.int32),
    }
    tensors = {part: tensor for part, tensor in (parts | changes).items() if tensor is not None}
    check_codes(tensors, "model.layers.0.mlp.up_proj", group, symmetric)


@CASES.case(
    "a dense int4 weight that lacks a part", "up_proj.weight_packed: missing from the checkpoint"
)
def _(b: Bench) -> None:
    check(weight_packed=None)


@CASES.case(
    "a dense int4 weight of fewer words than its shape says",
    "does not hold 64 values of 4 bits, which take 8 int32",
)
def _(b: Bench) -> None:
    check(weight_packed=torch.zeros(16, 7, dtype=torch.int32))


@CASES.case(
    "a dense int4 weight of other rows than its shape says",
    "where dimension 0 must be 16; the checkpoint is damaged",
)
def _(b: Bench) -> None:
    check(weight_packed=torch.zeros(15, 8, dtype=torch.int32))


@CASES.case(
    "a weight_shape that is none",
    "up_proj.weight_shape: torch.int64 [16, 0] is not the shape of a matrix",
)
def _(b: Bench) -> None:
    check(weight_shape=torch.tensor([16, 0]))


@CASES.case(
    "a dense int4 weight with a scale that is not finite",
    "up_proj.weight_scale: holds values that are not finite",
)
def _(b: Bench) -> None:
    check(weight_scale=torch.full((16, 2), torch.nan))


@CASES.case(
    "scales in other groups than config.json has",
    "2 per row of 64 columns, but config.json has groups of 16 columns",
)
def _(b: Bench) -> None:
    check(group=16)


@CASES.case(
    "zero points that are not in int32 words",
    "up_proj.weight_zero_point: torch.int8 [2, 2] does not hold 16 values",
)
def _(b: Bench) -> None:
    check(weight_zero_point=torch.zeros(2, 2, dtype=torch.int8))


@CASES.case(
    "zero points, where config.json has a symmetric scheme",
    "weight_zero_point: must not be there, since config.json",
)
def _(b: Bench) -> None:
    check(symmetric=True)


@CASES.case(
    "int4 weights with reordered columns",
    "weight_g_idx: its columns were reordered (actorder: group)",
)
def _(b: Bench) -> None:
    check(weight_g_idx=torch.arange(64))


def gptq(
    symmetric: bool = True, bits: int = 4, reordered: bool = False, **changes: Tensor | None
) -> None:
    """Read a GPTQ weight [32, 64] in groups of 32 columns, with some of its parts replaced; None: left out."""
    from rac_modifier.checkpoint.gptq_awq import GptqEntries, check_gptq

    parts: dict[str, Tensor | None] = {
        "qweight": torch.zeros(2 * bits, 32, dtype=torch.int32),
        "qzeros": torch.full((2, bits), 0x77777777 if bits == 4 else 0, dtype=torch.int32),
        "scales": torch.ones(2, 32),
    }
    tensors = {part: tensor for part, tensor in (parts | changes).items() if tensor is not None}
    entries = {"bits": bits, "group_size": 32, "sym": symmetric, "desc_act": reordered}
    check_gptq(tensors, "model.layers.0.mlp.up_proj", GptqEntries.of(entries))


@CASES.case("a GPTQ weight that lacks a part", "up_proj.scales: missing from the checkpoint")
def _(b: Bench) -> None:
    gptq(scales=None)


@CASES.case(
    "a GPTQ weight in other groups than config.json has",
    "but a weight of this size and config.json's groups have [2, 32]; restore",
)
def _(b: Bench) -> None:
    gptq(scales=torch.ones(4, 32))


@CASES.case(
    "GPTQ zero points of fewer rows than the weight",
    "but a weight of this size and config.json's groups have [2, 4]; restore",
)
def _(b: Bench) -> None:
    gptq(qzeros=torch.zeros(2, 3, dtype=torch.int32))


@CASES.case(
    "GPTQ zero points, where config.json is symmetric",
    "not 8 everywhere, but config.json says that it is symmetric",
)
def _(b: Bench) -> None:
    gptq(qzeros=torch.zeros(2, 4, dtype=torch.int32))


@CASES.case(
    "GPTQ zero points of 3 bits in format 1",
    "have two meanings, since AutoGPTQ and GPTQModel subtract different",
)
def _(b: Bench) -> None:
    gptq(symmetric=False, bits=3)


@CASES.case(
    "a g_idx that fills groups unevenly",
    "up_proj.g_idx: does not give 32 columns to each of 2 groups",
)
def _(b: Bench) -> None:
    gptq(g_idx=torch.zeros(64, dtype=torch.int32))


@CASES.case("desc_act without g_idx", "up_proj.g_idx: missing from the checkpoint")
def _(b: Bench) -> None:
    gptq(reordered=True)


@CASES.case(
    "AWQ zero points, where config.json has none",
    "not all 8, but config.json says zero_point: false; restore",
)
def _(b: Bench) -> None:
    from rac_modifier.checkpoint.gptq_awq import AwqEntries, check_awq

    words = {
        "qweight": torch.zeros(64, 4, dtype=torch.int32),
        "qzeros": torch.zeros(2, 4, dtype=torch.int32),
    }
    entries = AwqEntries.of({"bits": 4, "group_size": 32, "zero_point": False})
    check_awq({**words, "scales": torch.ones(2, 32)}, "model.layers.0.mlp.up_proj", entries)
