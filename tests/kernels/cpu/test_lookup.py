"""Rows of packed weights, against the dense weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rac_modifier.checkpoint.stored_weight import all_stored, from_dense
from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.backend import pack
from rac_modifier.kernels.cpu.lookup import lookup
from tests.kernels.cpu.rounded import quantize_groups, quantize_rows

ROWS, COLUMNS = 70, 96


def stored(kind: str):
    weight = torch.randn(ROWS, COLUMNS)
    if kind == "int8":
        values, scale = quantize_rows(weight)
        return replace(all_stored(values, "w"), scale=scale)
    if kind == "int4":
        values, scale = quantize_groups(weight, 32)
        return replace(all_stored(values, "w"), scale=scale, bits=4)
    if kind == "int3":
        values, scale = quantize_groups(weight, 32)
        return replace(all_stored(values.clamp(-4, 3), "w"), scale=scale, bits=3)
    if kind == "int4 with zeros":
        values, scale = quantize_groups(weight, 32)
        zeros = torch.randint(0, 16, scale.shape, dtype=torch.uint8)
        codes = (values.view(ROWS, 3, 32) + 8).clamp(0, 15)
        values = (codes - zeros[:, :, None].to(torch.int8)).view(ROWS, COLUMNS)
        return replace(all_stored(values, "w"), scale=scale, bits=4, zeros=zeros)
    return from_dense(weight.masked_fill(torch.rand(ROWS, COLUMNS) < 0.5, 0), "w")


@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "int4 with zeros", "floats"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_in_any_order_and_often(kernel, kind, dtype):
    weight = stored(kind)
    packed = pack(weight, torch.float32)
    dense = weight.dequantized(torch.float32)
    ids = torch.tensor([[69, 0, 17], [17, 16, 15], [0, 69, 33]])
    found = lookup(ids, packed, ROWS, COLUMNS, dtype)
    assert found.dtype == dtype
    assert torch.equal(found, dense[ids].to(dtype))


def test_no_rows_and_rows_that_are_not_there(best):
    packed = pack(stored("int8"), torch.float32)
    assert lookup(
        torch.empty(0, dtype=torch.int64), packed, ROWS, COLUMNS, torch.float32
    ).shape == (0, COLUMNS)
    for ids, says in (([3, 70], "ids 3 to 70"), ([-1, 5], "ids -1 to 5")):
        with pytest.raises(RacError, match=f"{says}: the weight has rows 0 to 69"):
            lookup(torch.tensor(ids), packed, ROWS, COLUMNS, torch.float32)


def test_compiled(best):
    packed = pack(stored("int4"), torch.float32)
    ids = torch.randint(0, ROWS, (5,))
    compiled = torch.compile(
        lambda ids: lookup(ids, packed, ROWS, COLUMNS, torch.bfloat16) * 2,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(ids), lookup(ids, packed, ROWS, COLUMNS, torch.bfloat16) * 2)
