"""Packing and unpacking, and data that was damaged or forged."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.packed import pack_dense, pack_values
from tests.kernels.cpu.kernel_helpers import (
    FORMS,
    Packed,
    bitmask_of,
    check_form,
    integers,
    pack,
    random_mask,
    sparse,
    unpacked,
)

DTYPES = [torch.bfloat16, torch.float32]


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
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


# Of a type with masks: columns of a mask, and the bit of row n and column k of it.
PLACES = {
    "bf16": (2, lambda n, k: 2 * n + k),
    "fp32": (2, lambda n, k: 16 * k + n),
    "int8": (4, lambda n, k: 4 * n + k),
    "int4": (4, lambda n, k: 4 * n + k),
}


@pytest.mark.parametrize(("number", "name"), [(0, "bf16"), (1, "fp32"), (2, "int8"), (4, "int4")])
def test_the_layout_of_masks_and_values(best, number, name):
    """Against the description in csrc/format/layout.h, in plain Python: [20, 40], two panels of 64 columns."""
    wide, place = PLACES[name]
    mask, zeros = random_mask(20, 40, 0.4), None
    if number < 2:
        stored = torch.randn(20, 40).to(DTYPES[number])
        data = pack_values(stored[mask], bitmask_of(mask), 40)
    else:
        stored = torch.randint(0, 1 << int(name[3:]), (20, 40), dtype=torch.uint8)
        dense = stored.to(torch.int8)
        if name == "int4":  # codes less their codes of zero, per group of 8 columns
            zeros = torch.randint(0, 16, (20, 5), dtype=torch.uint8)
            dense = dense - zeros.to(torch.int8).repeat_interleave(8, dim=1)
        data = pack_values(dense[mask], bitmask_of(mask), 40, int(name[3:]), zeros)
    masks, packed, offsets = b"", b"", [0]
    for panel in range(2):
        values = 0
        for first in range(0, 64, wide):
            bits = {
                place(n, k): stored[16 * panel + n, first + k]
                for n in range(min(16, 20 - 16 * panel))
                for k in range(wide)
                if first + k < 40 and mask[16 * panel + n, first + k]
            }
            masks += sum(1 << bit for bit in bits).to_bytes(2 * wide, "little")
            taken = [bits[bit].reshape(1).view(torch.uint8).tolist() for bit in sorted(bits)]
            if name == "int4":
                codes = [*(code for (code,) in taken), *[0] * (len(taken) % 2)]
                taken = [
                    [low | high << 4] for low, high in zip(codes[::2], codes[1::2], strict=True)
                ]
            packed += b"".join(map(bytes, taken))
            values += len(taken)
        offsets.append(offsets[-1] + values)
    raw = bytes(data.tolist())
    code_bytes, groups = (len(packed), 5) if zeros is not None else (0, 0)
    header = (b"RACpack1", number, 0, 20, 40, int(mask.sum()), code_bytes, groups)
    assert struct.unpack_from("<8siiqqqqq", raw) == header
    assert struct.unpack_from("<3Q", raw, 64) == tuple(offsets)
    assert raw[128 : 128 + len(masks)] == masks
    at = 128 + len(masks)
    for row in range(20 if groups else 0):
        first = at + row // 16 * groups * 16 + row % 16
        assert [raw[first + 16 * group] for group in range(groups)] == zeros[row].tolist()
    at += -(-2 * groups * 16 // 64) * 64
    assert raw[at : at + len(packed)] == packed
    assert len(raw) == -(-(at + len(packed)) // 64) * 64 + 64


def byte_of(codes: list[int], bits: int, line: int) -> int:
    """Of a row and a column of the next quads, whose `codes` these are: one of 8 bits, two of 4, eight of 3, four of 2."""
    if bits == 8:
        return codes[0] & 255
    if bits == 4:
        return codes[0] | codes[1] << 4
    if bits == 2:
        return codes[0] | codes[2] << 2 | codes[1] << 4 | codes[3] << 6
    low, high = codes[2 * line], codes[2 * line + 1]
    return low | (codes[6] >> line & 1) << 3 | high << 4 | (codes[7] >> line & 1) << 7


@pytest.mark.parametrize(("bits", "quads", "lines"), [(8, 1, 1), (4, 2, 1), (3, 8, 3), (2, 4, 1)])
def test_the_layout_without_masks(best, bits, quads, lines):
    """The same for [20, 100], two panels of 128 columns, with a code of zero per row."""
    dense, zeros = torch.randint(0, 1 << bits, (20, 100), dtype=torch.uint8).to(torch.int8), None
    padded = torch.zeros(32, 128, dtype=torch.int8)
    padded[:20, :100] = dense
    if bits < 8:
        zeros = torch.randint(0, 1 << bits, (20, 1), dtype=torch.uint8)
        dense = dense - zeros.to(torch.int8)
    data = pack_dense(dense, bits, zeros)
    expected = [
        byte_of(padded[16 * panel + n, first + k : first + 4 * quads : 4].tolist(), bits, line)
        for panel in range(2)
        for first in range(0, 128, 4 * quads)
        for line in range(lines)
        for n in range(16)
        for k in range(4)
    ]
    values_at = 128 if zeros is None else 192
    assert data[values_at:-64].tolist() == expected
    if zeros is not None:
        assert data[128 : 128 + 20].tolist() == zeros.flatten().tolist()
    assert data[8].item() == {8: 3, 4: 5, 3: 6, 2: 7}[bits]


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
        (32, (4, 1), 9, r"\[4, 1\] does not fit a weight with 9 columns"),
        (32, (4, 1), -8, r"does not fit a weight with -8 columns"),
        (0, (0, 1), 8, r"does not fit a weight"),
        (32, (4,), 8, r"bitmask: torch.uint8 \[4\]"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(best, values, shape, columns, message):
    bitmask = torch.full(shape, 255, dtype=torch.uint8)
    with pytest.raises(RacError, match=message):
        pack(torch.ones(values), bitmask, columns)


def test_other_dtypes_are_refused(best):
    bitmask = torch.full((4, 1), 255, dtype=torch.uint8)
    for values in (
        torch.ones(32).double(),
        torch.ones(32).to(torch.float8_e4m3fn),
        torch.ones(32, dtype=torch.int16),
    ):
        with pytest.raises(RacError, match="keep it dense"):
            pack(values, bitmask, 8)
    with pytest.raises(RacError, match="bitmask"):
        pack(torch.ones(32), bitmask.to(torch.int16), 8)


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


@pytest.mark.parametrize(
    ("form", "at", "change", "message"),
    [
        ("int8", 12, 2, "its header has 2 where activations are rounded to bytes or not"),
        ("int4", 64 + 64 + 3 * 48 * 4 + 5, 16, "a code of zero is"),
        ("int4", 48, 2, "impossible sizes"),  # groups of zeros
        ("int4", 40, -1, "bytes where its header needs|last offset"),  # bytes of codes
        ("int4", 72, 1, "panel 0: its masks and its offset disagree"),
        ("int4", 32, 1, "last offset is not the number"),  # values, of which two share a byte
        ("dense8", 72, 1, "panel 1: its offset is not that of a dense weight"),
        ("dense3", 128, 8, "a code of zero is .*, more than 7"),
        ("dense2", 48, -3, "sizes"),
    ],
)
def test_forged_integers_are_refused(best, form, at, change, message):
    _, weight = integers(form, 40, 96, 3, zeros=True)
    check_form(weight, form)
    with pytest.raises(RacError, match="its header says"):
        check_form(weight, "dense4" if FORMS[form][1] else "int4")
    with pytest.raises(RacError, match="its header says"):
        check_form(weight._replace(columns=88), form)
    weight.data[at] = (int(weight.data[at]) + change) % 256
    with pytest.raises(RacError, match=message):
        check_form(weight, form)


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
            pack_values(too_large[mask], bitmask_of(mask), 64, 4)
    for shape, dtype in (((16, 3), torch.uint8), ((32, 1), torch.uint8), ((16, 1), torch.int8)):
        with pytest.raises(RacError, match=r"zeros: .* need uint8"):
            pack_dense(-too_large, bits, torch.full(shape, most).to(dtype))
    with pytest.raises(RacError, match="impossible"):  # groups of 4 columns are too narrow
        pack_dense(-too_large, bits, torch.full((16, 16), most, dtype=torch.uint8))
    for matrix in (torch.ones(4, 4), torch.ones(4, dtype=torch.int8)):
        with pytest.raises(RacError, match="an int8 matrix on the CPU is needed"):
            pack_dense(matrix, bits)


def test_a_moved_bit_beyond_the_last_row_or_column_is_refused(best):
    """The number of bits is unchanged."""
    for shape, message in (((17, 32), "beyond the last row"), ((16, 33), "beyond the last column")):
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[-1, -1] = True
        _, weight = sparse(mask, torch.bfloat16)
        words = weight.data[128:-128].view(torch.int32)
        place = int(words.nonzero()[-1])
        raw = struct.pack("<I", int(words[place]) << (2 if shape[0] == 17 else 1))
        with pytest.raises(RacError, match=message):
            check_form(Packed(forged(weight, 128 + 4 * place, raw), *shape), "bf16")
