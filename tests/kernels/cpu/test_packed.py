"""Packing and unpacking, and data that was damaged or forged."""

from __future__ import annotations

import mmap
import random
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import DENSE8, Library
from rac_modifier.kernels.cpu.packed import check_packed
from tests.kernels.cpu.kernel_helpers import (
    Packed,
    bitmask_of,
    multiply,
    pack,
    random_mask,
    sparse,
    unpacked,
)

DTYPES = [torch.bfloat16, torch.float32]
HEADER = struct.Struct("<8siiqqq")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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


def test_the_layout_word_by_word(best):
    """Against the description in csrc/layout.h, in plain Python."""
    for dtype, place in (
        (torch.bfloat16, lambda n, k: 2 * n + k),
        (torch.float32, lambda n, k: 16 * k + n),
    ):
        mask = random_mask(20, 37, 0.5)
        dense, weight = sparse(mask, dtype)
        words, values, offsets = [], [], [0]
        for panel in range(2):
            for pair in range(32):  # 37 columns: two tiles of 16 pairs
                there = {
                    place(n, k): dense[16 * panel + n, 2 * pair + k]
                    for n in range(min(16, 20 - 16 * panel))
                    for k in range(2)
                    if 2 * pair + k < 37 and mask[16 * panel + n, 2 * pair + k]
                }
                words.append(sum(1 << bit for bit in there))
                values += [there[bit] for bit in sorted(there)]
            offsets.append(len(values))
        raw = bytes(weight.data.tolist())
        assert HEADER.unpack_from(raw) == (
            b"RACpack1",
            DTYPES.index(dtype),
            0,
            20,
            37,
            int(mask.sum()),
        )
        assert struct.unpack_from("<3Q", raw, 64) == tuple(offsets)
        assert list(struct.unpack_from("<64I", raw, 128)) == words
        stored = weight.data[384 : 384 + len(values) * dtype.itemsize].view(dtype)
        assert torch.equal(stored, torch.stack(values))
        assert weight.data.numel() == -(-(384 + stored.nbytes) // 64) * 64 + 64


def test_two_of_four_values_come_as_a_matrix_and_half_becomes_float(best):
    mask = torch.tensor([True, False, True, False]).repeat(8, 4)
    values = torch.randn(8, 8).half()
    weight = pack(values, bitmask_of(mask), 16)
    assert unpacked(weight).dtype == torch.float32
    assert torch.equal(unpacked(weight)[mask], values.float().flatten())


def test_strided_tensors_are_packed_too(best):
    mask = random_mask(20, 64, 0.5)
    dense, weight = sparse(mask, torch.float32)
    values = torch.stack([dense[mask]] * 2, dim=1)[:, 0]
    other = pack(values, bitmask_of(mask).t().contiguous().t(), 64)
    assert torch.equal(other.data, weight.data)


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
        "impossible sizes": forged(weight, 8, struct.pack("<i", 7)),
        "its header needs": forged(weight, 16, struct.pack("<q", 41 + 16)),
        "its header says": forged(weight, 16, struct.pack("<q", 41)),
        "first offset": forged(weight, 64, struct.pack("<Q", 1)),
        "panel 0: its masks and its offset disagree": forged(weight, 72, struct.pack("<Q", 2**63)),
        "disagree": forged(weight, first_word, struct.pack("<I", 0xFFFFFFFF)),
        "too short": weight.data[:63],
        "64 bytes where": weight.data[:64],
        "not aligned": torch.cat([weight.data, weight.data])[8 : 8 + weight.data.numel()],
    }
    for message, data in cases.items():
        with pytest.raises(RacError, match=message):
            check_packed(data, 40, 50, torch.bfloat16)


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
            check_packed(forged(weight, 128 + 4 * place, raw), *shape, torch.bfloat16)


def test_wrong_arguments_are_refused(best):
    _, weight = sparse(random_mask(16, 32, 0.5), torch.bfloat16)
    for rows, columns, dtype, data in (
        (-16, 32, torch.bfloat16, weight.data),
        (16, 2**40, torch.bfloat16, weight.data),
        (16, 33, torch.bfloat16, weight.data),
        (16, 32, torch.float32, weight.data),
        (16, 32, torch.float16, weight.data),
        (16, 32, torch.bfloat16, weight.data.view(torch.int8)),
        (16, 32, torch.bfloat16, weight.data.view(1, -1)),
        (16, 32, torch.bfloat16, weight.data.repeat_interleave(2)[::2]),
    ):
        with pytest.raises(RacError):
            check_packed(data, rows, columns, dtype)


def test_random_damage_is_refused_or_harmless(best):
    rng = random.Random(0)
    _, weight = sparse(random_mask(24, 70, 0.5), torch.bfloat16)
    accepted = 0
    for _ in range(1500):
        data = weight.data.clone()
        for _ in range(rng.choice([1, 1, 2, 4])):
            data[rng.randrange(rng.choice([64, 128, len(data)]))] = rng.randrange(256)
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data))].clone()
        try:
            check_packed(data, 24, 70, torch.bfloat16)
        except RacError:
            continue
        accepted += 1
        damaged = Packed(data, 24, 70)
        multiply(torch.ones(rng.choice([1, 20]), 70), damaged)
        unpacked(damaged)
    assert 100 < accepted < 1400


COLLAPSE = 25  # MADV_COLLAPSE, from Linux 6.1 on


def huge_bytes(address: int) -> int:
    """Bytes in huge pages of the mapping that holds this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return 1024 * int(line.split()[1])
    return 0


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_a_weight_is_in_huge_pages_although_its_memory_was_in_use_before(native_path):
    with mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as probe:
        probe[::4096] = b"x" * (len(probe) // 4096)
        try:
            probe.madvise(mmap.MADV_HUGEPAGE)
            probe.madvise(COLLAPSE)
        except OSError as error:
            pytest.skip(f"this system puts no pages together: {error}")
    library, rows, columns = Library(native_path), 4096, 2048
    data = torch.ones(
        library.packed_bytes(rows, columns, rows * columns, DENSE8), dtype=torch.uint8
    )  # in small pages
    library.pack(
        torch.ones(rows, columns, dtype=torch.int8), None, None, rows, columns, DENSE8, data
    )
    assert huge_bytes(data.data_ptr() + data.nbytes // 2) >= 2 << 20
