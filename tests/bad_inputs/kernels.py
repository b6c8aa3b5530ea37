"""Mistakes about quantized weights of other tools."""

import torch
from torch import Tensor

from tests.bad_inputs.bench import Case, Cases

CASES = Cases()
NAME = "model.layers.0.mlp.up_proj"


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
