"""Packing and unpacking, and data that was damaged or forged."""

import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import pack_values
from tests.kernels.cpu.kernel_helpers import (
    Packed,
    bitmask_of,
    check_form,
    pack,
    pack_dense,
    random_mask,
    sparse,
    unpacked,
)

DTYPES = [torch.bfloat16, torch.float32]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 60),
    columns=st.integers(1, 200),
    density=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
)
def test_unpacking_returns_every_bit(kernel, rows, columns, density, dtype):
    """Random bit patterns: every NaN, infinity, denormal and -0.0 among the stored values."""
    mask = random_mask(rows, columns, density)
    integer = torch.int16 if dtype == torch.bfloat16 else torch.int32
    info = torch.iinfo(integer)
    bits = torch.randint(info.min, info.max, (rows, columns), dtype=integer).masked_fill(~mask, 0)
    weight = pack(bits[mask].view(dtype), bitmask_of(mask), columns)
    assert unpacked(weight).dtype == dtype
    assert torch.equal(unpacked(weight).view(integer), bits)


def test_two_of_four_values_come_as_a_matrix_and_half_becomes_float(best):
    mask = torch.tensor([True, False, True, False]).repeat(8, 4)
    values = torch.randn(8, 8).half()
    weight = pack(values, bitmask_of(mask), 16)
    assert unpacked(weight).dtype == torch.float32
    assert torch.equal(unpacked(weight)[mask], values.float().flatten())


@pytest.mark.parametrize(
    ("values", "shape", "columns", "message"),
    [
        (10, (4, 1), 8, r"32 bits set and there are 10 values"),
        (33, (4, 1), 8, r"impossible"),
        (28, (4, 1), 7, r"row 0 of the bitmask has bits beyond column 7"),
        (32, (4, 1), 9, r"bitmask: 4 bytes, where 8 are needed"),
        (32, (4, 1), -8, r"impossible"),
        (0, (0, 1), 8, r"impossible"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(best, values, shape, columns, message):
    bitmask = torch.full(shape, 255, dtype=torch.uint8)
    with pytest.raises(RacError, match=message):
        pack(torch.ones(values), bitmask, columns)


def test_other_dtypes_are_refused(best):
    with pytest.raises(RacError, match="keep it dense"):
        pack(torch.ones(32, dtype=torch.int16), torch.full((4, 1), 255, dtype=torch.uint8), 8)
    with pytest.raises(RacError, match=r"bfloat16 without a mask: .*keep it dense"):
        pack_dense(torch.ones(2, 4, dtype=torch.bfloat16))


def forged(weight: Packed, at: int, raw: bytes) -> torch.Tensor:
    data = weight.data.clone()
    data[at : at + len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return data


def test_forged_data_is_refused(best):
    _, weight = sparse(random_mask(40, 50, 0.5), torch.bfloat16)
    first_word = 64 + 64
    cases = {
        "not that of a packed weight": forged(weight, 0, b"X"),
        "impossible sizes": forged(weight, 8, struct.pack("<i", 6)),
        "its header needs": forged(weight, 16, struct.pack("<q", 41 + 16)),
        "its header says": forged(weight, 16, struct.pack("<q", 41)),
        "rounded to bytes or not": forged(weight, 12, b"\x01"),
        "first offset": forged(weight, 64, struct.pack("<Q", 1)),
        "panel 0: its masks and its offset disagree": forged(weight, 72, struct.pack("<Q", 2**63)),
        "disagree": forged(weight, first_word, struct.pack("<I", 0xFFFFFFFF)),
        "too short": weight.data[:63],
        "64 bytes where": weight.data[:64],
        "not aligned": torch.cat([weight.data, weight.data])[8 : 8 + weight.data.numel()],
    }
    for message, data in cases.items():
        with pytest.raises(RacError, match=message):
            check_form(Packed(data, 40, 50), "bf16")


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_codes_that_do_not_fit_are_refused(best, bits):
    most = 1 << (bits - 1)
    message = f"does not fit {bits} bits, 0 to {2 * most - 1} with its code of zero"
    too_large = torch.full((16, 64), most, dtype=torch.int8)
    with pytest.raises(RacError, match=message):
        pack_dense(too_large, bits)
    mask = torch.ones(16, 64, dtype=torch.bool)
    if bits == 4:
        with pytest.raises(RacError, match=message):
            pack_values(too_large[mask], bitmask_of(mask), (16, 64), 4)
    for groups in (3, 16):  # no divisor of the columns; groups of 4 columns are too narrow
        with pytest.raises(RacError, match="impossible"):
            pack_dense(-too_large, bits, torch.full((16, groups), most, dtype=torch.uint8))
    with pytest.raises(RacError, match="zeros: 32 bytes, where 16 are needed"):
        pack_dense(-too_large, bits, torch.full((32, 1), most, dtype=torch.uint8))
