"""Dense weights of 4 bits and fewer, as compressed-tensors writes them, and damaged ones."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.quantization_config import WeightScheme
from rac_modifier.formats.words import PackQuantized, pack_words, unpack_words
from tests.checkpoint import gptq_awq_tensors
from tests.checkpoint.gptq_awq_tensors import pack_quantized, words


def check_codes(tensors, module, group, symmetric, bits=4):
    strategy = "channel" if group is None else "group"
    scheme = WeightScheme(Encoding("int", bits, group, symmetric), strategy, "pack-quantized")
    return PackQuantized.check(tensors, module, scheme)


def drawn(rows, columns, groups, bits=4, symmetric=False):
    """The tensors of a weight, and the weight that they mean."""
    weight = gptq_awq_tensors.drawn(rows, columns, columns // groups, symmetric, bits)
    return pack_quantized(weight, symmetric), weight.meant


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(1, 8, 1), (3, 64, 2), (16, 24, 3), (9, 37, 1), (8, 12, 2)]
)
def test_the_weight_is_that_of_its_codes(rows, columns, groups, symmetric, bits):
    tensors, weight = drawn(rows, columns, groups, bits, symmetric)
    actual = check_codes(tensors, "w", None if groups == 1 else columns // groups, symmetric, bits)
    assert (actual.rows, actual.columns, actual.bits, actual.density) == (rows, columns, bits, 1.0)
    assert (actual.zeros is None) == symmetric
    torch.testing.assert_close(actual.dequantized(torch.float32), weight)
    if actual.zeros is not None:  # what the kernels keep: a code is a value and its code of zero
        codes = actual.dense().view(rows, groups, -1) + actual.zeros[:, :, None].to(torch.int8)
        assert torch.equal(words(codes.view(rows, columns), bits), tensors["weight_packed"])


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_what_compressed_tensors_compresses(group, symmetric, bits):
    """Its own compressor writes the tensors, and its own decompressor says what they mean."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    grouped = {"strategy": "group", "group_size": group}
    arguments = {"strategy": "channel"} if group is None else grouped
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=bits, symmetric=symmetric, **arguments),
    )
    shape = (20, 1 if group is None else 96 // group)
    state = {"weight": torch.randn(20, 96), "weight_scale": torch.rand(shape) / 4 + 0.1}
    if not symmetric:
        half = 1 << (bits - 1)
        state["weight_zero_point"] = torch.randint(-half, half, shape, dtype=torch.int8)
    compressor = PackedQuantizationCompressor
    tensors = compressor.compress(state, scheme)
    if tensors["weight_packed"].shape[1] == -(-96 // 10):  # 0.17, which vLLM 0.32 asks for
        with pytest.raises(RacError, match=r"does not hold 96 values of 3 bits .*before 0\.19"):
            check_codes(tensors, "w", group, symmetric, bits)
        return
    actual = check_codes(tensors, "w", group, symmetric, bits)
    torch.testing.assert_close(
        actual.dequantized(torch.float32),
        compressor.decompress(tensors, scheme)["weight"],
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    ("scheme", "linear", "vocabulary"),
    [
        (("int", 4, "group", 64, True, "pack-quantized"), None, None),
        (("int", 2, "channel", None, False, "pack-quantized"), None, "its weights are int2"),
        (("int", 8, "channel", None, True, "int-quantized", "int8"), "its weights are int8", None),
        (("int", 8, "group", 64, False, "pack-quantized"), *2 * ["its weights are .*int8"]),
        (("float", 4, "group", 64, True, "pack-quantized"), *2 * ["its weights are float4"]),
        (("int", 4, "tensor", None, True, "pack-quantized"), *2 * ["its scales are per tensor"]),
        (("int", 4, "group", 64, True, "int-quantized"), *2 * ["its format is int-quantized, not"]),
        (("int", 4, "group", 64, True, "pack-quantized", "int8"), *2 * ["its activations are"]),
    ],
)
def test_which_schemes_a_kernel_reads(scheme, linear, vocabulary):
    """Heads and embeddings may have int8, too, which linear layers have no kernel for."""
    for expected, of_vocabulary in ((linear, False), (vocabulary, True)):
        kind, bits, strategy, group, symmetric, *stored = scheme
        codes = Encoding(kind, bits, group, symmetric)
        reason = WeightScheme(codes, strategy, *stored).why_no_kernel(of_vocabulary)
        assert reason is None if expected is None else re.match(expected, str(reason))


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


DAMAGE = [
    ("weight_packed", None, ": missing"),
    ("weight_zero_point", None, ": missing"),
    ("weight_shape", torch.tensor([9, 0]), ": .* is not the shape of a matrix"),
    ("weight_packed", zeros(8, 4), ": shape .* does not have 9 rows"),
    ("weight_packed", zeros(9, 3), ": .* does not hold 32 values of 4 bits"),
    ("weight_packed", zeros(9, 4, dtype=torch.int64), ": torch.int64 .*4 int32"),
    ("weight_scale", torch.ones(8, 2), ": shape"),
    ("weight_scale", torch.full((9, 2), float("nan")), ": .*not finite"),
    ("weight_zero_point", zeros(9, 2, dtype=torch.int8), ": torch.int8"),
    ("weight_zero_point", zeros(3, 2), ": .* does not hold 9 values"),
    ("weight_g_idx", zeros(32), ": its columns are reordered"),
]


@pytest.mark.parametrize(("part", "tensor", "message"), DAMAGE)
def test_damaged_parts(part, tensor, message):
    tensors = {**drawn(9, 32, 2)[0], part: tensor}
    with pytest.raises(RacError, match=f"^m.{part}{message}"):
        check_codes({k: v for k, v in tensors.items() if v is not None}, "m", 16, False)


@pytest.mark.parametrize(
    ("group", "symmetric", "message"),
    [
        (None, True, r"zero_point: must not be there, .*; restore the config\.json"),
        (None, False, r"scale: 2 per row .* config\.json has one per row; restore"),
        (12, False, r"scale: 2 per row .* config\.json has groups of 12 columns"),
    ],
)
def test_what_contradicts_config_json(group, symmetric, message):
    tensors, _ = drawn(4, 32, 1 if symmetric else 2)
    with pytest.raises(RacError, match=rf"^m.weight_{message}"):
        check_codes(tensors, "m", group, symmetric)


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


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_2_to_8_bits_are_unpacked(bits):
    for columns in (1, 7, 32, 45):
        values = random_values(3, columns, bits, columns)
        codes = values.long() + (1 << (bits - 1))
        assert torch.equal(unpack_words(words(codes, bits), bits, columns), values)


def test_what_cannot_be_packed_is_refused():
    for values, message in ((torch.tensor([8], dtype=torch.int8), "outside"), ([1.0], "int8")):
        with pytest.raises(RacError, match=message):
            pack_words(torch.as_tensor(values), 4)


INT4 = (WeightScheme(Encoding("int", 4, 32), "group", "pack-quantized"),)
SCALE = {"weight_scale": torch.ones(2, 1)}


@pytest.mark.parametrize("schemes", [(), INT4])
def test_the_width_follows_from_the_number_of_words(schemes):
    weight = torch.randint(-8, 8, (2, 32), dtype=torch.int8)
    actual = PackQuantized.read(PackQuantized.compress(weight, 4) | SCALE, "a", schemes)
    assert actual is not None
    assert (torch.equal(actual.dense(), weight), actual.bits) == (True, 4)
    if not schemes:
        eight = PackQuantized.read(PackQuantized.compress(weight, 8) | SCALE, "a")
        assert eight is not None
        assert eight.bits == 8
        one_word_for_both = PackQuantized.compress(weight[:, :3].contiguous(), 4)
        assert PackQuantized.read(one_word_for_both | SCALE, "a") is None


def test_eight_bits_with_zero_points_are_not_read():
    """A code less its code of zero, -255 to 255, does not fit int8."""
    tensors, _ = drawn(4, 32, 2, bits=8)
    assert PackQuantized.read(tensors, "a") is None
    with pytest.raises(RacError, match=r"^a\.weight_zero_point: asymmetric weights of 8 bits have"):
        check_codes(tensors, "a", 16, False, bits=8)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weight_shape": torch.tensor([3, 8])}, r"packed: shape \[2, 1\] does not have 3 rows"),
        ({"weight_shape": torch.tensor([2, 800])}, "packed: 1 int32 words per row do not hold 800"),
    ],
)
def test_words_that_contradict_their_shape(parts, message):
    good = PackQuantized.compress(torch.zeros(2, 8, dtype=torch.int8), 4)
    with pytest.raises(RacError, match=rf"^a\.weight_{message}"):
        PackQuantized.read({**good, **SCALE, **parts}, "a", INT4)
