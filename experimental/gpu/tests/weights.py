"""Random sparse weights for the tests, and the error that a product may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from rac_modifier.formats.stored_weight import StoredWeight, from_dense


def kept_of_four(rows: int, columns: int, most: int = 2) -> Tensor:
    """Bool [rows, columns], `most` of each four True."""
    return (torch.rand(rows, columns // 4, 4).argsort(dim=-1) < most).view(rows, columns)


def bf16_weight(rows: int, columns: int, most: int = 2) -> StoredWeight:
    """Normal values."""
    values = torch.randn(rows, columns).to(torch.bfloat16)
    return from_dense(values.masked_fill(~kept_of_four(rows, columns, most), 0.0), "layer")


def int4_weight(
    rows: int, columns: int, group: int, scales: torch.dtype = torch.bfloat16
) -> StoredWeight:
    """Values of -8 to 7, none of them 0, with a scale per row and group, of `scales`: a dtype that holds them exactly."""
    values = torch.randint(-8, 7, (rows, columns)).to(torch.int8)
    values += values >= 0
    stored = from_dense(values.masked_fill(~kept_of_four(rows, columns), 0), "layer")
    return replace(
        stored, scale=(torch.rand(rows, columns // group) + 0.1).to(scales).float(), bits=4
    )


def unstructured_weight(rows: int, columns: int, density: float | Tensor = 0.5) -> StoredWeight:
    """Normal values, none of them 0; `density` is one for all, or of any shape that [rows, columns] has room for."""
    values = torch.randn(rows, columns).to(torch.bfloat16)
    values = torch.where(values == 0, torch.ones_like(values), values)
    return from_dense(values.masked_fill(torch.rand(rows, columns) >= density, 0.0), "layer")


def int8_weight(rows: int, columns: int, density: float | Tensor = 0.5) -> StoredWeight:
    """Values of -128 to 127, none of them 0, with a scale per row; `density` as above."""
    values = torch.randint(-128, 127, (rows, columns)).to(torch.int8)
    values += values >= 0
    stored = from_dense(values.masked_fill(torch.rand(rows, columns) >= density, 0), "layer")
    return replace(stored, scale=torch.rand(rows, 1) + 0.1)


def fp8_weight(rows: int, columns: int, density: float | Tensor = 0.5) -> StoredWeight:
    """Values of e4m3, every code but the zeros and NaNs about equally often, with a scale per row; `density` as above."""
    codes = torch.randint(1, 127, (rows, columns)) + 128 * torch.randint(0, 2, (rows, columns))
    codes = codes.masked_fill(torch.rand(rows, columns) >= density, 0).to(torch.uint8)
    stored = from_dense(codes.view(torch.float8_e4m3fn), "layer")
    return replace(stored, scale=torch.rand(rows, 1) + 0.1)


def int4_any_weight(
    group: int, rows: int, columns: int, density: float | Tensor = 0.5
) -> StoredWeight:
    """Values of -8 to 7, none of them 0, with a scale per row and group; columns padded to whole groups; `density` as above."""
    values = torch.randint(-8, 7, (rows, columns)).to(torch.int8)
    values += values >= 0
    values = pad(values.masked_fill(torch.rand(rows, columns) >= density, 0), (0, -columns % group))
    stored = from_dense(values, "layer")
    return replace(stored, scale=torch.rand(rows, values.shape[1] // group) + 0.1, bits=4)


def grouped_weight(
    make: Callable[..., StoredWeight],
    group: int,
    rows: int,
    columns: int,
    density: float | Tensor = 0.5,
) -> StoredWeight:
    """Int8 or fp8 that `make` makes, with a scale per row and group; columns padded to whole groups; `density` as above."""
    values = make(rows, columns, density).dense()
    padded = pad(values.view(torch.int8), (0, -columns % group)).view(values.dtype)
    return replace(
        from_dense(padded, "layer"), scale=torch.rand(rows, padded.shape[1] // group) + 0.1
    )


def leaning(make: Callable[..., StoredWeight], rows: int, columns: int) -> StoredWeight:
    """Some lanes store much and others little, which change places: streams that must be filled with zeros."""
    density = torch.full((rows, columns), 0.05)
    density[:, : columns // 2].view(rows, -1, 32)[:, :, :8] = 0.95
    density[:, columns // 2 :].view(rows, -1, 32)[:, :, 8:16] = 0.95
    return make(rows, columns, density)


def skewed(make: Callable[..., StoredWeight], rows: int, columns: int) -> StoredWeight:
    """Rows of all densities, in no order, some empty and some full; and an end that stores nothing."""
    density = torch.rand(rows, 1).mul(1.4).sub(0.2).clamp(0, 1).expand(rows, columns).clone()
    density[:, columns * 7 // 8 :] = 0.0
    return make(rows, columns, density)


# Weights of any pattern by name; `make` has rows, columns and density as parameters.
AWKWARD: dict[str, Callable[[Callable[..., StoredWeight]], StoredWeight]] = {
    "half": lambda make: make(70, 1032),
    "odd": lambda make: make(37, 200, 0.3),
    "small": lambda make: make(3, 8, 0.5),
    "empty": lambda make: make(40, 328, 0.0),
    "full": lambda make: make(33, 520, 1.0),
    "sparse": lambda make: make(32, 2056, 0.05),
    "skewed": lambda make: skewed(make, 90, 1600),
    "leaning": lambda make: leaning(make, 32, 4096),
    "one row": lambda make: make(64, 640, torch.eye(64)[:, :1]),
    "one column": lambda make: make(64, 640, torch.eye(640)[77]),
    "even columns": lambda make: make(32, 1024, torch.tensor([1.0, 0.0]).repeat(512)),
}


def order_of(packed: Tensor, rows: int) -> Tensor:
    """Int64 [rows]: the row of a packed weight of any pattern that each sorted row is."""
    return packed.view(torch.int32)[:rows].long()


def assert_product(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """Y is x W^T + bias up to sums in fp32 and one rounding to bfloat16; `dense` is in float64."""
    exact, terms = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    bound = terms * 2.0**-20 + exact.abs() * 2.0**-8
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all()), float(
        (y.double() - exact).abs().max()
    )
