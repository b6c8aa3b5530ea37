"""Packed weights of any pattern that are wrong: copies at other times than the packer chose, and bytes that are damaged."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from rac_gpu.layout import (
    UNSTRUCTURED,
    UNSTRUCTURED_E4M3,
    UNSTRUCTURED_INT4,
    UNSTRUCTURED_INT8,
    pack,
)
from rac_gpu.programs import expand_program, program

from tests.emulate import emulate, product
from tests.weights import fp8_weight, int4_any_weight, int8_weight, unstructured_weight

KERNELS = {
    "bf16": (UNSTRUCTURED, unstructured_weight),
    "int8": (UNSTRUCTURED_INT8, int8_weight),
    "fp8": (UNSTRUCTURED_E4M3, fp8_weight),
    "int4 g64": (UNSTRUCTURED_INT4[64], partial(int4_any_weight, 64)),
    "int4 g128": (UNSTRUCTURED_INT4[128], partial(int4_any_weight, 128)),
}
# How many random damages each gets: fp8 is int8 with other values.
SEEDS = {"bf16": 12, "int8": 12, "fp8": 3, "int4 g64": 12, "int4 g128": 12}


@pytest.mark.parametrize(
    ("kernel", "columns", "steps", "at"),
    [
        ("bf16", 4096, slice(8, 17), 8),
        ("bf16", 4096, slice(8, 17), 16),
        ("int8", 4096, slice(4, 12), 4),
        ("int8", 4096, slice(4, 12), 11),
        ("fp8", 4096, slice(4, 12), 11),
        *((f"int4 g{group}", 8192, slice(4, 20), at) for group in (64, 128) for at in (4, 19)),
    ],
)
def test_a_schedule_that_copies_too_early_or_too_late_is_noticed(kernel, columns, steps, at):
    """The packer decides when a line is overwritten: the emulator must see a wrong decision.

    The groups of some steps are copied all at the first or all at the last of them.
    """
    layout, make = KERNELS[kernel]
    packed = pack(make(32, columns), layout)
    words, x = packed.view(torch.int32), torch.randn(1, columns).to(torch.bfloat16)
    counts = words.view(-1, 32)[int(words[32])].view(torch.uint8)
    groups = counts[steps].sum()
    counts[steps] = 0
    counts[at] = groups
    _, error = product(layout, program(layout, 2, 1), packed, x, 32)
    assert error.startswith(("race", "read of shared memory that nobody wrote")), error


@pytest.mark.parametrize(
    ("kernel", "seed"), [(kernel, seed) for kernel, most in SEEDS.items() for seed in range(most)]
)
def test_damaged_bytes_lead_nowhere_outside(kernel, seed):
    """Results are wrong then; but no access is out of range, whatever the packed bytes are."""
    torch.manual_seed(seed)
    layout, make = KERNELS[kernel]
    packed = pack(make(40, 640), layout)
    words = packed.view(torch.int32)
    header = slice(0, 64 + 32) if seed % 3 else slice(64, len(words))
    at = torch.randint(header.start, header.stop, (1 if seed % 2 else 40,))
    words[at] = torch.randint(-(2**31), 2**31, at.shape).int() >> int(torch.randint(0, 28, ()))
    x = torch.randn(3, 640).to(torch.bfloat16)
    errors = [product(layout, program(layout, 2, 1), packed, x, 40)[1]]
    out, sizes = torch.zeros(40, 640).to(torch.bfloat16), (40, 640, 0, len(words) // 32, 0)
    errors.append(emulate(layout, expand_program(layout), (2, 1), packed, None, None, out, sizes))
    assert not [
        error
        for error in errors
        if error.startswith(("access", "misaligned", "deadlock", "write to"))
    ], errors
