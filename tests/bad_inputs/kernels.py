"""Mistakes about quantized weights of other tools, and about the kernels that serve them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.bad_inputs.bench import Bench, Case, Cases

CASES = Cases()
NAME = "model.layers.0.mlp.up_proj"


@CASES.case(
    "`RAC_KERNEL` of an instruction set that is not known",
    'RAC_KERNEL="sse": this machine runs portable',
)
def _(b: Bench) -> None:
    from rac_modifier.kernels.cpu import support

    b.monkeypatch.setenv("RAC_KERNEL", "sse")
    support.support.__wrapped__()


def dense_int4(symmetric: bool = False, **changes: Tensor) -> None:
    """Read a dense int4 weight [16, 64] of a checkpoint, with some of its parts replaced."""
    from rac_modifier.checkpoint.dense_codes import PackQuantized
    from rac_modifier.checkpoint.quantization_config import WeightScheme

    parts = {
        "weight_packed": torch.zeros(16, 8, dtype=torch.int32),
        "weight_scale": torch.ones(16, 2),
        "weight_shape": torch.tensor([16, 64]),
        "weight_zero_point": torch.zeros(2, 2, dtype=torch.int32),
    }
    scheme = WeightScheme("int", 4, "group", 32, symmetric, "pack-quantized")
    PackQuantized.check(parts | changes, NAME, scheme)


def gptq(symmetric: bool, bits: int, **changes: Tensor) -> None:
    """Read a GPTQ weight [32, 64] in groups of 32 columns, with some of its parts replaced."""
    from rac_modifier.checkpoint.gptq_awq import Gptq

    parts = {
        "qweight": torch.zeros(2 * bits, 32, dtype=torch.int32),
        "qzeros": torch.zeros((2, bits), dtype=torch.int32),
        "scales": torch.ones(2, 32),
    }
    entries = {"bits": bits, "group_size": 32, "sym": symmetric, "desc_act": False}
    Gptq.of(entries).check(parts | changes, NAME)


CASES += [
    Case(
        "a dense int4 weight of fewer words than its shape says",
        "does not hold 64 values of 4 bits, which take 8 int32",
        lambda b: dense_int4(weight_packed=torch.zeros(16, 7, dtype=torch.int32)),
    ),
    Case(
        "a dense int4 weight with a scale that is not finite",
        "up_proj.weight_scale: holds values that are not finite",
        lambda b: dense_int4(weight_scale=torch.full((16, 2), torch.nan)),
    ),
    Case(
        "zero points, where config.json has a symmetric scheme",
        "weight_zero_point: must not be there, since config.json",
        lambda b: dense_int4(symmetric=True),
    ),
    Case(
        "int4 weights with reordered columns",
        "weight_g_idx: its columns were reordered (actorder: group)",
        lambda b: dense_int4(weight_g_idx=torch.arange(64)),
    ),
    Case(
        "a GPTQ weight in other groups than config.json has",
        "but a weight of this size and config.json's groups have [2, 32]; restore",
        lambda b: gptq(True, 4, scales=torch.ones(4, 32)),
    ),
    Case(
        "GPTQ zero points, where config.json is symmetric",
        "not 8 everywhere, but config.json says that it is symmetric",
        lambda b: gptq(True, 4),
    ),
    Case(
        "GPTQ zero points of 3 bits in format 1",
        "have two meanings, since AutoGPTQ and GPTQModel subtract different",
        lambda b: gptq(False, 3),
    ),
]
