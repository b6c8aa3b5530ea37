"""In which dtype values are packed."""

from __future__ import annotations

import pytest
import torch

from rac_modifier.kernels.cpu.encoding import ValueEncoding, encoding_of, kept_dtype

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16


def test_bfloat16_values_stay_bfloat16_in_float32():
    assert kept_dtype(BF16, FP32) == BF16
    assert kept_dtype(FP32, BF16) == BF16
    assert kept_dtype(FP16, FP16) == FP16
    assert kept_dtype(FP16, FP32) == FP32


@pytest.mark.parametrize(
    ("stored", "group", "encoding"),
    [
        (BF16, 96, ValueEncoding(BF16)),
        (FP32, 96, ValueEncoding(FP32)),
        (torch.int8, 96, ValueEncoding(torch.int8, True)),
        (torch.int8, 32, ValueEncoding(torch.int8, True)),
        (
            torch.int8,
            6,
            ValueEncoding(BF16, False, "int8 values in groups of 6, rounded to bfloat16"),
        ),
        (torch.int32, 32, ValueEncoding(torch.int8, True, bits=4)),
        (torch.int32, 96, ValueEncoding(torch.int8, True, bits=4)),
        (
            torch.int32,
            12,
            ValueEncoding(torch.int8, True, "int4 values in groups of 12, one byte each"),
        ),
        (
            torch.int32,
            2,
            ValueEncoding(BF16, False, "int4 values in groups of 2, rounded to bfloat16"),
        ),
        (torch.float8_e4m3fn, 96, ValueEncoding(BF16, True, "fp8 values as bfloat16, exactly")),
        (
            torch.float8_e5m2,
            32,
            ValueEncoding(BF16, False, "fp8 values in groups of 32, rounded to bfloat16"),
        ),
    ],
    ids=str,
)
def test_encodings(stored, group, encoding):
    assert encoding_of(stored, group, 96, FP32) == encoding


@pytest.mark.parametrize("bits", [3, 2])
@pytest.mark.parametrize(
    ("group", "kept", "note"),
    [
        (32, None, ""),
        (96, None, ""),
        (192, None, ""),
        (24, 4, "int{} values in groups of 24, four bits each"),
        (12, 8, "int{} values in groups of 12, one byte each"),
    ],
)
def test_few_bits_take_more_in_groups_that_their_form_does_not_hold(group, kept, note, bits):
    expected = ValueEncoding(torch.int8, True, note.format(bits), bits=kept or bits)
    assert encoding_of(torch.int32, group, 192, FP32, bits) == expected


def test_few_bits_with_a_scale_per_row_have_any_number_of_columns():
    assert encoding_of(torch.int32, 37, 37, FP32, 3) == ValueEncoding(torch.int8, True, bits=3)
    note = "int3 values in groups of 2, rounded to bfloat16"
    assert encoding_of(torch.int32, 2, 96, FP32, 3) == ValueEncoding(BF16, False, note)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_bfloat16_holds_every_fp8_value(dtype):
    values = torch.arange(256, dtype=torch.uint8).view(dtype)
    exact = values.to(BF16).double()
    assert torch.equal(exact[exact.isfinite()], values.double()[exact.isfinite()])
    assert torch.equal(exact.isfinite(), values.float().isfinite())
