"""The pattern of a weight's zeros, against masks that are drawn here."""

from __future__ import annotations

import pytest
import torch

from rac_modifier.checkpoint.detect import find_structure, fits_24, without_negative_zeros
from rac_modifier.checkpoint.stored_weight import count_stored

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn]


def values(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Without a zero."""
    return (
        torch.randint(1, 8, (rows, columns)) * (1 - 2 * torch.randint(0, 2, (rows, columns)))
    ).to(dtype)


def masked(weight: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Zeros put into any dtype, by its bits."""
    weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[weight.element_size()])[zero] = 0
    return weight


def zeros_of(rows: int, columns: int, n: int, m: int) -> torch.Tensor:
    """N of every M, at random."""
    order = torch.rand(rows, columns // m, m).argsort(dim=2)
    return (order < n).view(rows, columns)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (3, 8), (5, 8), (6, 16), (9, 16)])
def test_n_of_m_is_found(n: int, m: int, dtype: torch.dtype) -> None:
    weight = masked(values(128, 256, dtype), zeros_of(128, 256, n, m))
    assert find_structure(weight) == f"{n}:{m}"


@pytest.mark.parametrize(("n", "m", "same"), [(4, 8, "4:8"), (8, 16, "8:16")])
def test_a_pattern_of_larger_groups_is_no_pattern_of_smaller_ones(
    n: int, m: int, same: str
) -> None:
    assert find_structure(masked(values(128, 256), zeros_of(128, 256, n, m))) == same


def test_one_broken_group_breaks_the_pattern() -> None:
    weight = masked(values(128, 256), zeros_of(128, 256, 2, 4))
    weight[127, 252:] = 1.0
    assert find_structure(weight) == "unstructured"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("rows", [4, 64, 256])
def test_zeros_at_random_places_are_unstructured(share: float, rows: int) -> None:
    """Also where few groups or many zeros make them keep some pattern by chance."""
    weight = masked(values(rows, 64), torch.rand(rows, 64) < share)
    assert find_structure(weight) == "unstructured"


def test_rounding_kept_weights_to_zero_leaves_the_pattern() -> None:
    """As int4 does with one kept weight in six."""
    zero = zeros_of(64, 128, 2, 4) | (torch.rand(64, 128) < 1 / 6)
    assert find_structure(masked(values(64, 128, torch.int8), zero)) == "2:4"


def test_columns_that_are_no_multiple() -> None:
    assert find_structure(masked(values(128, 250), torch.rand(128, 250) < 0.5)) == "unstructured"
    assert find_structure(masked(values(128, 252), zeros_of(128, 252, 2, 4))) == "2:4"


def test_many_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from rac_modifier.checkpoint import bitmask

    monkeypatch.setattr(bitmask, "_BLOCK", 64)
    weight = masked(values(100, 64), zeros_of(100, 64, 2, 4))
    assert find_structure(weight) == "2:4"
    assert fits_24(weight)
    weight[99, :4] = 1.0
    assert find_structure(weight) == "unstructured"
    assert not fits_24(weight)
    assert count_stored(weight) == int((weight != 0).sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_negative_zeros_are_zeros_to_the_pattern_and_values_to_the_layout(
    dtype: torch.dtype,
) -> None:
    zero = zeros_of(64, 64, 2, 4)
    plain = values(64, 64).masked_fill(zero, 0.0).to(dtype)
    multiplied = (-values(64, 64).abs() * ~zero).to(
        dtype
    )  # as a mask that is multiplied in leaves them
    assert fits_24(plain)
    assert not fits_24(multiplied)
    assert (count_stored(plain), count_stored(multiplied)) == (int((~zero).sum()), 64 * 64)
    assert find_structure(multiplied) == "2:4"
    positive = without_negative_zeros(multiplied)
    assert torch.equal(positive.float(), multiplied.float())
    assert fits_24(positive)
    assert count_stored(positive) == int((~zero).sum())
    assert count_stored(multiplied) == 64 * 64, "the argument is left as it is"
