import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.checkpoint.int32_words import pack_words, unpack_words
from rac_modifier.errors import RacError


def random_values(rows: int, columns: int, bits: int, seed: int) -> torch.Tensor:
    limit = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit, (rows, columns), generator=generator).to(torch.int8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([4, 8]), st.integers(0, 100))
def test_words_are_compressed_tensors_own_of_the_values_filled_up_with_zeros(
    rows, columns, bits, seed
):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = random_values(rows, columns, bits, seed)
    words = pack_words(values, bits)
    filled = torch.nn.functional.pad(values, (0, -columns % (32 // bits)))
    assert torch.equal(words, helpers.pack_to_int32(filled, bits))
    assert torch.equal(helpers.unpack_from_int32(words, bits, values.shape), values)
    # theirs fill up with other bits, which nobody reads
    assert torch.equal(
        unpack_words(helpers.pack_to_int32(values, bits).contiguous(), bits, columns), values
    )
    assert torch.equal(unpack_words(pack_words(values[0], bits), bits, columns), values[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([2, 3]), st.integers(0, 100))
def test_words_of_few_bits_are_read_as_compressed_tensors_writes_them(rows, columns, bits, seed):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    values = random_values(rows, columns, bits, seed)
    words = helpers.pack_to_int32(values, bits)
    if words.shape[1] != -(-columns * bits // 32):
        pytest.skip("compressed-tensors 0.17 has ten values of 3 bits in each word")
    assert torch.equal(unpack_words(words, bits, columns), values)
    with pytest.raises(RacError, match=f"does not hold {columns + 90} values of {bits} bits"):
        unpack_words(words, bits, columns + 90)


def test_words_of_other_bits_are_refused():
    with pytest.raises(
        RacError, match="words of 5-bit values are not read here; those of 2, 3, 4, 8 bits are"
    ):
        unpack_words(torch.zeros(1, 5, dtype=torch.int32), 5, 32)


def test_known_nibbles():
    values = torch.tensor([-8, 7, 0, 1, -1, 2, 3, 4, 5], dtype=torch.int8)
    # lowest nibble first, each + 8; the second word is filled up with the value 0
    assert [word & 0xFFFFFFFF for word in pack_words(values, 4).tolist()] == [
        0xCBA798F0,
        0x8888888D,
    ]


@pytest.mark.parametrize(
    ("values", "bits", "message"),
    [
        (torch.tensor([8], dtype=torch.int8), 4, "outside"),
        (torch.tensor([1.0]), 4, "int8"),
        (torch.tensor([1], dtype=torch.int8), 3, "3 bits"),
    ],
)
def test_what_cannot_be_packed_is_refused(values, bits, message):
    with pytest.raises(RacError, match=message):
        pack_words(values, bits)
