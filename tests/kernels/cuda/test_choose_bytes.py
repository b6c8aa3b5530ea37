"""The constants of the kernels' byte permutations, read from their sources and tried with everything that they can meet."""

from __future__ import annotations

import re

import pytest

from tests.kernels.cuda.emulate import SOURCES


def prmt(low: int, high: int, which: int) -> int:
    """PTX `prmt.b32` in its default mode: nibble k names byte k of the result; its upper bit repeats that byte's sign."""
    pair = high << 32 | low
    result = 0
    for k in range(4):
        nibble = which >> 4 * k & 15
        byte = pair >> 8 * (nibble & 7) & 255
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * k
    return result


def constants(source: str, pattern: str) -> list[int]:
    """The numbers that a pattern's groups find in a source, once."""
    (found,) = re.findall(pattern, (SOURCES / source).read_text())
    return [int(each, 16) for each in ([found] if isinstance(found, str) else found)]


@pytest.mark.parametrize("nothing", [0x80808080, 0x00000000, 0x08080808])
def test_a_window_gives_each_stored_place_the_next_value(nothing):
    """All sixteen ways in which four places are stored, which are bits 0, 4, 8 and 12."""
    factor, unstored = constants("windows.h", r"stored \* (0x[0-9a-f]+) \+ (0x[0-9a-f]+)")
    window = 0x44332211
    for places in range(16):
        stored = sum((places >> k & 1) << 4 * k for k in range(4))
        chosen = prmt(window, nothing, (stored * factor + unstored) & 0xFFFFFFFF)
        values = iter([0x11, 0x22, 0x33, 0x44])
        for k in range(4):
            expected = next(values) if places >> k & 1 else nothing & 255
            assert chosen >> 8 * k & 255 == expected, (places, k)


def test_four_nibbles_become_four_bytes():
    (which,) = constants(
        "unstructured_int4.cu", r"choose_bytes\(window, window >> 4, (0x[0-9a-f]+)\)"
    )
    for value in range(1 << 16):
        window = value | 0x9ABC0000
        chosen = prmt(window, window >> 4, which)
        assert [chosen >> 8 * k & 15 for k in range(4)] == [value >> 4 * k & 15 for k in range(4)]


def test_bytes_1_and_3_of_a_word_are_alone_in_its_halves():
    """Int8: with zeros above, for the multiplication that reads a byte as a bf16's bits."""
    (which,) = constants("bytes.h", r"odd = two\(choose_bytes\(word, 0, (0x4[0-9a-f]+)\)\)")
    for byte in range(256):
        assert (
            prmt(byte << 8 | (255 - byte) << 24 | 0x00770077, 0, which) == byte | (255 - byte) << 16
        )


def test_codes_of_fp8_are_shifted_into_a_bf16s_places_with_their_signs():
    """Bytes 0 and 2, and 1 and 3: in each half the sign in bit 15, exponent and mantissa from bit 4 on."""
    even, odd = constants(
        "bytes.h",
        r"even = two\(choose_bytes\(word, 0, (0x2[0-9a-f]+)\)\);\s+odd = two\(choose_bytes\(word, 0, (0x[0-9a-f]+)\)\)",
    )
    (mask,) = constants("bytes.h", r">> 4\) & (0x[0-9a-f]+)")
    for low in range(256):
        for high in range(256):
            for which, word in ((even, low | high << 16), (odd, low << 8 | high << 24)):
                for others in (0x00000000, 0xFF00FF00 if which == even else 0x00FF00FF):
                    bits = prmt(word | others, 0, which)
                    shifted = (bits - (1 << 32) if bits >> 31 else bits) >> 4 & mask
                    assert shifted == sum(
                        ((code & 128) << 8 | (code & 127) << 4) << 16 * h
                        for h, code in enumerate((low, high))
                    )
