"""Random sparse weights for the tests, and the error that a product may have."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rac_modifier.checkpoint.stored_weight import StoredWeight, from_dense


def kept_of_four(rows: int, columns: int, most: int = 2) -> Tensor:
    """Bool [rows, columns], `most` of each four True."""
    return (torch.rand(rows, columns // 4, 4).argsort(dim=-1) < most).view(rows, columns)


def bf16_weight(rows: int, columns: int, most: int = 2) -> StoredWeight:
    """Normal values."""
    values = torch.randn(rows, columns).to(torch.bfloat16)
    return from_dense(values.masked_fill(~kept_of_four(rows, columns, most), 0.0), "layer")


def int4_weight(rows: int, columns: int, group: int) -> StoredWeight:
    """Values of -8 to 7, none of them 0, with a scale per row and group."""
    values = torch.randint(-8, 7, (rows, columns)).to(torch.int8)
    values += values >= 0
    stored = from_dense(values.masked_fill(~kept_of_four(rows, columns), 0), "layer")
    return replace(stored, scale=torch.rand(rows, columns // group) + 0.1, bits=4)


def unstructured_weight(rows: int, columns: int, density: float | Tensor = 0.5) -> StoredWeight:
    """Normal values, none of them 0; `density` is one for all, or of any shape that [rows, columns] has room for."""
    values = torch.randn(rows, columns).to(torch.bfloat16)
    values = torch.where(values == 0, torch.ones_like(values), values)
    return from_dense(values.masked_fill(torch.rand(rows, columns) >= density, 0.0), "layer")


def assert_product(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """Y is x W^T + bias up to sums in fp32 and one rounding to bfloat16; `dense` is in float64."""
    exact, terms = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    bound = terms * 2.0**-20 + exact.abs() * 2.0**-8
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all()), float((y.double() - exact).abs().max())
