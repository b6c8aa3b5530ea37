"""Sparse 4-bit weights as planes of bits (PLANES4): the layout, when it is used, what is refused.

test_int4_product.py multiplies them."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import support
from rac_modifier.kernels.cpu.library import INT4, PLANES4
from rac_modifier.kernels.cpu.packed import check_packed, pack_scale, sparse_int4_type
from rac_modifier.kernels.cpu.support import library_and_isa
from tests.kernels.cpu.kernel_helpers import (
    Packed,
    assert_integer_product,
    bitmask_of,
    multiply,
    random_mask,
    scaled,
    unpacked,
)
from tests.kernels.cpu.test_int4_product import weight_of

PLANES_KERNELS = ("avx2", "avxvnni")


def planes_of(
    rows: int, columns: int, density: float, groups: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Packed]:
    """Codes, mask and zeros of a random weight, and it as PLANES4, on any processor."""
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(rows, columns, density, seed)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int8, generator=generator)
    zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    dense = codes - zeros.to(torch.int8).repeat_interleave(columns // groups, dim=1)
    panels = (
        torch.nn.functional.pad(zeros, (0, 0, 0, -rows % 16))
        .view(-1, 16, groups)
        .transpose(1, 2)
        .contiguous()
    )
    library, _ = library_and_isa()
    bitmask = bitmask_of(mask)
    data = torch.empty(
        library.packed_bytes(rows, columns, int(mask.sum()), PLANES4, bitmask, groups),
        dtype=torch.uint8,
    )
    library.pack(dense[mask], bitmask, panels, rows, columns, PLANES4, data)
    return codes, mask, zeros, Packed(data, rows, columns)


def test_the_layout_byte_by_byte(best):
    """Against the description in csrc/layout.h, in plain Python."""
    codes, mask, zeros, weight = planes_of(20, 64, 0.4, 2)
    words, packed, offsets = [], b"", [0]
    for panel in range(2):
        for tile in range(2):
            for pair in range(8):
                there = {}  # bits of the masks of two rows: what is stored
                for row in (0, 1):
                    n = 16 * panel + 2 * pair + row
                    for column in range(32):
                        if n < 20 and mask[n, 32 * tile + column]:
                            stored = int(codes[n, 32 * tile + column]) ^ int(zeros[n, tile])
                            there[32 * row + column % 4 * 8 + column // 4] = stored
                bits = sum(1 << bit for bit in there)
                words += [bits & 0xFFFFFFFF, bits >> 32]
                for plane in range(4):
                    number = sum(
                        (there[bit] >> plane & 1) << i for i, bit in enumerate(sorted(there))
                    )
                    packed += number.to_bytes(-(-len(there) // 8), "little")
        offsets.append(len(packed))
    raw = bytes(weight.data.tolist())
    assert struct.unpack_from("<8siiqqqqq", raw) == (
        b"RACpack1",
        6,
        0,
        20,
        64,
        int(mask.sum()),
        len(packed),
        2,
    )
    assert struct.unpack_from("<3Q", raw, 64) == tuple(offsets)
    assert list(struct.unpack_from("<64I", raw, 128)) == words
    assert raw[384 + 64 : 384 + 64 + len(packed)] == packed


def test_only_groups_of_whole_words_and_processors_that_gain_have_planes(kernel):
    library, isa = library_and_isa()
    fast = library.sparse_int4_type(isa)
    assert fast == INT4 or kernel in PLANES_KERNELS
    for columns, group in ((96, 96), (37, 37), (2048, 2048), (128, 64), (1536, 768)):
        assert sparse_int4_type(columns, group) == fast
    for columns, group in ((96, 24), (1248, 624), (128, 0)):
        assert sparse_int4_type(columns, group) == INT4


def test_other_instruction_sets_refuse_planes_and_unpack_them(kernel):
    library, isa = library_and_isa()
    codes, mask, zeros, weight = planes_of(37, 96, 0.5, 3)
    dense = (codes - zeros.to(torch.int8).repeat_interleave(32, dim=1)).masked_fill(~mask, 0)
    assert torch.equal(unpacked(weight), dense)
    scale, x = torch.rand(37, 3) + 0.01, torch.randn(2, 96)
    if kernel == "portable" or library.sparse_int4_type(isa) == PLANES4:
        assert_integer_product(
            multiply(x, weight, None, pack_scale(scale)), x, scaled(dense, scale), 3
        )
    else:
        with pytest.raises(RacError, match="packed for AVX2 with pdep"):
            multiply(x, weight, None, pack_scale(scale))


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_planes_give_the_bits_of_the_other_layout(kernel, density):
    """All sums are exact, and are scaled and added in the same order."""
    if kernel not in PLANES_KERNELS:
        pytest.skip("has no planes")
    scale = pack_scale(torch.rand(50, 4), narrow=True)
    pairs = [
        weight_of(50, 256, min(density, 0.99), 4, True, known=known)[1] for known in (True, False)
    ]
    for m in range(1, 7):
        x = torch.randn(m, 256)
        one, other = (multiply(x, weight, None, scale) for weight in pairs)
        assert torch.equal(one, other)


def test_forged_planes_are_refused(best):
    _, _, _, weight = planes_of(40, 64, 0.5, 2)
    data, masks_at = weight.data, 64 + 64

    def forged(at: int, value: int) -> Tensor:
        copy = data.clone()
        copy[at] = value
        return copy

    check_packed(data, 40, 64, torch.int8, bits=4)
    last_rows = masks_at + 4 * (2 * 32 + 12)  # words of rows that only pad the last panel
    for at, value, message in (
        (
            40,
            int(data[40]) ^ 4,
            "bytes where its header needs|last offset|impossible",
        ),  # bytes of codes
        (40, int(data[40]) ^ 1, "impossible sizes"),  # four planes have the same number of bytes
        (72, (int(data[72]) + 4) % 256, "panel 0: its masks and its offset disagree"),
        (32, int(data[32]) ^ 1, "last offset is not the number"),
        (last_rows, 255, "panel 2: its masks and its offset disagree|last row|last offset"),
        (48, 4, "impossible sizes"),  # groups of zeros of 16 columns
    ):
        with pytest.raises(RacError, match=message):
            check_packed(forged(at, value), 40, 64, torch.int8, bits=4)


def test_groups_that_cut_a_word_are_refused(best, monkeypatch):
    monkeypatch.setenv("RAC_KERNEL", "portable")
    support.forget()
    *_, weight = planes_of(16, 96, 0.5)
    with pytest.raises(RacError, match="groups of 24 columns; they must have a multiple of 32"):
        multiply(torch.randn(1, 96), weight, None, pack_scale(torch.ones(16, 4)))
