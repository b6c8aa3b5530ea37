"""Names of formats and structures; packed tensors against what config.json describes."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import (
    FORMAT_24,
    FORMAT_BITMASK,
    FORMATS,
    PackedFiles,
    packed_modules,
    structure_of,
)
from rac_modifier.errors import RacError
from rac_modifier.formats import bitmask
from rac_modifier.formats.stored_weight import FLOATS
from tests.checkpoint.checkpoint_helpers import PRUNERS, same_bits

BITMASK, TWO_OF_FOUR = FORMATS[FORMAT_BITMASK], FORMATS[FORMAT_24]
WORDS8 = {"config_groups": {"g": {"weights": {"num_bits": 8}}}, "format": "pack-quantized"}


def files(folder, dtype=torch.bfloat16, **changes):
    tensors = {
        "up.compressed": torch.ones(2, 2, dtype=dtype),
        "up.bitmask": torch.ones(2, 1, dtype=torch.uint8),
    }
    tensors |= {"up.shape": torch.tensor([[2], [4]]), "norm.weight": torch.ones(4)}
    tensors |= {name.replace("_", ".", 1): tensor for name, tensor in changes.items()}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        folder / "model.safetensors",
    )
    return TensorFiles(folder)


def config(sparse: str | None, **entries: object) -> dict:
    sparsity = {"sparsity_config": {"format": sparse}} if sparse else {}
    return {"quantization_config": {**sparsity, **entries}}


@pytest.mark.parametrize(
    ("dtype", "entries", "in_words"),
    [
        (torch.int8, {}, False),
        (torch.int8, WORDS8, True),
        (torch.int32, {}, True),
        (torch.float8_e4m3fn, WORDS8, False),
    ],
)
def test_modules_that_are_int32_words_to_upstream(tmp_path, dtype, entries, in_words):
    with files(tmp_path, dtype) as tensor_files:
        packed = PackedFiles(tensor_files, config(FORMAT_24, **entries))
        assert (packed.modules, packed.in_words("up")) == (["up"], in_words)


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        (None, {}, "up is packed but config.json has no sparsity_config"),
        (FORMAT_24, {"up_weight": torch.ones(2, 4)}, r"up\.weight: both dense and packed"),
        (FORMAT_24, {"up_compressed": None, "up_bitmask": None}, "no tensor is packed; copy it"),
    ],
)
def test_contradictions(tmp_path, format, changes, message):
    with files(tmp_path, **changes) as tensor_files, pytest.raises(RacError, match=message):
        PackedFiles(tensor_files, config(format))


def test_structures():
    for value, expected in (("2:4", "2:4"), ("04:8", "4:8"), ("0:0", "unstructured")):
        assert structure_of(value, "a") == expected
    for value in ("", "dense", "5:4", "-1:4", "2:4:8", "1:10000000"):
        with pytest.raises(RacError, match=r"^layers\.0: mask_structure .*") as caught:
            structure_of(value, "layers.0")
        assert value in str(caught.value)


def test_packed_modules_are_known_by_any_part_that_only_they_have():
    names = ["b.compressed", "b.shape", "a.row_offsets", "c.bitmask", "d.shape", "e.weight"]
    assert packed_modules([*names, "bitmask", "f.bitmasks"]) == ["a", "b", "c"]


DTYPES = [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
Parts = dict[str, torch.Tensor]


def sparse(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Draw a 2:4 weight with -0.0 and groups of fewer than two nonzeros."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 20
    PRUNERS["2:4"](weight)
    weight.view(-1, 4)[::3] = 0
    if dtype.is_floating_point:
        weight.view(-1, 4)[::15, 1] = -0.0
    return weight.to(dtype)


@settings(max_examples=80, deadline=None)
@given(
    format=st.sampled_from(sorted(FORMATS)),
    rows=st.integers(1, 9),
    fours=st.integers(1, 11),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    block=st.sampled_from([1, 40, 1 << 20]),
)
def test_a_weight_comes_back_to_the_bit(format, rows, fours, dtype, seed, block):
    weight = sparse(rows, 4 * fours, dtype, seed)
    before = weight.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmask, "_BLOCK", block)
        parts = FORMATS[format].compress(weight, "w")
        scales = {} if dtype in FLOATS else {"weight_scale": torch.ones(1)}
        restored = FORMATS[format].check({**parts, **scales}, "w")
        dense = restored.dense()
    assert same_bits(weight, before)
    assert sorted(parts) == sorted(FORMATS[format].parts)
    assert same_bits(dense, weight)
    nbytes = sum(part.nbytes for part in parts.values())
    stored = restored.values.numel()
    assert FORMATS[format].size(rows, 4 * fours, stored, 8 * dtype.itemsize) == nbytes


def test_known_bytes():
    weight = torch.tensor([[0, 1.0, 0, 2, 3, 4, 0, 0], [0, 0, 0, 5, 0, 0, 0, 0]])
    packed = TWO_OF_FOUR.compress(weight, "w")
    # Row 1 fills up with the leftmost zeros: columns 0 and 3, then 4 and 5.
    assert packed["bitmask"].tolist() == [[0b00111010], [0b00111001]]
    assert packed["compressed"].tolist() == [[1, 2, 3, 4], [0, 5, 0, 0]]
    assert packed["shape"].tolist() == [[2], [8]]
    packed = BITMASK.compress(weight, "w")
    assert packed["bitmask"].tolist() == [[0b00111010], [0b00001000]]
    assert packed["compressed"].tolist() == [1, 2, 3, 4, 5]
    assert packed["row_offsets"].tolist() == [0, 4]
    assert packed["shape"].tolist() == [2, 8]


def test_minus_zero_is_kept_where_there_is_room():
    """Two values leave no room for the -0.0 of the last group in 2:4."""
    weight = torch.tensor([[-0.0, 1.0, 0.0, 0.0], [0.0, 0.0, -0.0, -0.0], [2.0, -0.0, 3.0, 0.0]])
    restored = TWO_OF_FOUR.check(TWO_OF_FOUR.compress(weight, "w"), "w").dense()
    assert same_bits(restored[:2], weight[:2])
    assert restored[2].view(torch.int32)[1] == 0
    assert same_bits(BITMASK.check(BITMASK.compress(weight, "w"), "w").dense(), weight)


@pytest.mark.parametrize("format", FORMATS)
def test_four_bit_values_are_stored_in_words(format):
    weight = sparse(6, 20, torch.int8).clamp(-8, 7)
    parts = FORMATS[format].compress(weight, "w", 4)
    assert parts["compressed"].dtype == torch.int32
    stored = FORMATS[format].check({**parts, "weight_scale": torch.ones(6, 2)}, "w")
    assert (stored.bits, torch.equal(stored.dense(), weight)) == (4, True)
    nbytes = sum(part.nbytes for part in parts.values())
    assert FORMATS[format].size(6, 20, stored.values.numel(), 4) == nbytes
    with pytest.raises(RacError, match=r"^w\.compressed: shape .* does not fit"):
        FORMATS[format].check({**parts, "compressed": parts["compressed"][..., :-1]}, "w")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[0.0] * 8, [0.0] * 4 + [1.0, 2, 3, 0]]), "hold more than 2 nonzeros"),
        (torch.zeros(2, 6), "6 columns, no multiple of 4"),
        (torch.zeros(0, 8), "non-empty"),
        (torch.zeros(2, 8, dtype=torch.complex64), "complex64"),
    ],
)
def test_what_cannot_be_packed_as_24(weight, message, monkeypatch):
    monkeypatch.setattr(bitmask, "_BLOCK", 8)
    with pytest.raises(RacError, match=message):
        TWO_OF_FOUR.compress(weight, "some.module")


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Parts], Parts]:
    return lambda parts: {**parts, part: change(parts[part].clone())}


def without(part: str) -> Callable[[Parts], Parts]:
    return lambda parts: {name: tensor for name, tensor in parts.items() if name != part}


def put(index: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[index] = value
        return tensor

    return change


# The part that is named, and the damage.
DAMAGE = {
    "shape negative": ("bitmask", changed("shape", put(0, -5))),
    "shape of 2^62": ("bitmask", changed("shape", put(1, 2**62))),
    "shape float": ("shape", changed("shape", lambda t: t.float())),
    "bitmask int8": ("bitmask", changed("bitmask", lambda t: t.view(torch.int8))),
    "bit flipped": ("(bitmask|row_offsets)", changed("bitmask", lambda t: put(0, t[0, 0] ^ 1)(t))),
    "bits beyond K": ("bitmask", changed("bitmask", lambda t: put(2, 0x8A)(t))),
    "values short": ("compressed", changed("compressed", lambda t: t[..., :-1])),
    "values int64": ("compressed", changed("compressed", lambda t: t.long())),
    "values NaN": ("compressed", changed("compressed", put(3, float("nan")))),
    "no bitmask": ("bitmask", without("bitmask")),
}
OFFSETS = [
    without("row_offsets"),
    changed("row_offsets", put(1, 10**9)),
    changed("row_offsets", lambda t: t[:-1]),
    changed("row_offsets", lambda t: t.int()),
]


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("format", FORMATS)
def test_damage_is_refused_by_name(format, case):
    weight = torch.tensor([[0, 1.0, 0, 2] * 5] * 6)  # K = 20: three bytes, the last one half used
    part, damage = DAMAGE[case]
    with pytest.raises(RacError, match=rf"^some\.module\.{part}: "):
        FORMATS[format].check(damage(FORMATS[format].compress(weight, "w")), "some.module")


@pytest.mark.parametrize("damage", OFFSETS)
def test_damaged_offsets_are_refused(damage):
    parts = damage(BITMASK.compress(torch.eye(6, 20), "w"))
    with pytest.raises(RacError, match=r"^some\.module\.row_offsets"):
        BITMASK.check(parts, "some.module")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_of_eight_bits_is_refused(dtype):
    parts = BITMASK.compress(sparse(4, 8, dtype), "w")
    largest = torch.finfo(dtype).max
    parts["compressed"][0] = torch.tensor(largest).to(dtype)
    parts["weight_scale"] = torch.ones(1)
    BITMASK.check(parts, "w")
    parts["compressed"][0] = torch.tensor(float("nan")).to(dtype)
    with pytest.raises(RacError, match=r"^w\.compressed: holds values that are not finite"):
        BITMASK.check(parts, "w")


@pytest.mark.parametrize("format", FORMATS)
def test_shape_may_be_flat_or_a_column(format):
    weight = torch.tensor([[0, 1.0, 0, 2]])
    parts = FORMATS[format].compress(weight, "w")
    for shape in (parts["shape"].reshape(2), parts["shape"].reshape(2, 1)):
        assert torch.equal(FORMATS[format].check({**parts, "shape": shape}, "w").dense(), weight)
