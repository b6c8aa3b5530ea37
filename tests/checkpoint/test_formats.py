"""Names of formats and structures; packed tensors against what config.json describes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rac_modifier.checkpoint import bitmask
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import (
    FORMAT_24,
    FORMAT_BITMASK,
    PARTS,
    check,
    check_packed,
    pack,
    packed_modules,
    packed_size,
    structure_of,
)
from rac_modifier.checkpoint.quantization_config import WeightScheme
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import PRUNERS, same_bits

WORDS8 = WeightScheme("int", 8, "channel", None, True, "pack-quantized", None)


def files(
    folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: torch.Tensor | None
) -> TensorFiles:
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


@pytest.mark.parametrize(
    ("dtype", "schemes", "in_words"),
    [
        (torch.bfloat16, (), []),
        (torch.int8, (), []),
        (torch.int8, (WORDS8,), ["up"]),
        (torch.int32, (), ["up"]),
        (torch.float8_e4m3fn, (WORDS8,), []),
    ],
)
def test_modules_that_are_int32_words_to_upstream(
    tmp_path: Path, dtype: torch.dtype, schemes: tuple[WeightScheme, ...], in_words: list[str]
) -> None:
    with files(tmp_path, dtype) as tensor_files:
        assert check_packed(tensor_files, "sparse-24-bitmask", schemes) == in_words


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        (None, {}, "up is packed but config.json has no sparsity_config"),
        ("sparse-bitmask", {}, r"up\.row_offsets: missing"),
        ("sparse-24-bitmask", {"up_shape": None}, r"up\.shape: missing"),
        (
            "sparse-24-bitmask",
            {"up_weight": torch.ones(2, 4)},
            r"up\.weight: stored both dense and packed",
        ),
        (
            "sparse-24-bitmask",
            {"up_compressed": None, "up_bitmask": None},
            "no tensor is packed; copy the whole model",
        ),
    ],
)
def test_contradictions(tmp_path: Path, format: str | None, changes: dict, message: str) -> None:
    with files(tmp_path, **changes) as tensor_files, pytest.raises(RacError, match=message):
        check_packed(tensor_files, format)


def test_structures() -> None:
    for value, expected in (("2:4", "2:4"), ("04:8", "4:8"), ("0:0", "unstructured")):
        assert structure_of(value, "a") == expected
    for value in ("", "dense", "5:4", "-1:4", "2:4:8", "1:10000000"):
        with pytest.raises(RacError, match=r"^layers\.0: mask_structure .*") as caught:
            structure_of(value, "layers.0")
        assert value in str(caught.value)


def test_packed_modules_are_known_by_any_part_that_only_they_have() -> None:
    names = ["b.compressed", "b.shape", "a.row_offsets", "c.bitmask", "d.shape", "e.weight"]
    assert packed_modules([*names, "bitmask", "f.bitmasks"]) == ["a", "b", "c"]


FORMATS = [FORMAT_24, FORMAT_BITMASK]
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
    format=st.sampled_from(FORMATS),
    rows=st.integers(1, 9),
    fours=st.integers(1, 11),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
    block=st.sampled_from([1, 40, 1 << 20]),
)
def test_a_weight_comes_back_to_the_bit(
    format: str, rows: int, fours: int, dtype: torch.dtype, seed: int, block: int
) -> None:
    weight = sparse(rows, 4 * fours, dtype, seed)
    before = weight.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmask, "_BLOCK", block)
        parts = pack(weight, format, "w")
        restored = check(parts, format, "w", scaled=False)
        dense = restored.dense()
    assert same_bits(weight, before)
    assert tuple(parts) == PARTS[format]
    assert same_bits(dense, weight)
    nbytes = sum(part.nbytes for part in parts.values())
    stored = restored.values.numel()
    bits = 8 * dtype.itemsize
    assert packed_size(format, rows, 4 * fours, stored, bits) == nbytes


def test_known_bytes() -> None:
    weight = torch.tensor([[0, 1.0, 0, 2, 3, 4, 0, 0], [0, 0, 0, 5, 0, 0, 0, 0]])
    packed = pack(weight, FORMAT_24, "w")
    # Row 1 fills up with the leftmost zeros: columns 0 and 3, then 4 and 5.
    assert packed["bitmask"].tolist() == [[0b00111010], [0b00111001]]
    assert packed["compressed"].tolist() == [[1, 2, 3, 4], [0, 5, 0, 0]]
    assert packed["shape"].tolist() == [[2], [8]]
    packed = pack(weight, FORMAT_BITMASK, "w")
    assert packed["bitmask"].tolist() == [[0b00111010], [0b00001000]]
    assert packed["compressed"].tolist() == [1, 2, 3, 4, 5]
    assert packed["row_offsets"].tolist() == [0, 4]
    assert packed["shape"].tolist() == [2, 8]


def test_minus_zero_is_kept_where_there_is_room() -> None:
    """Two values leave no room for the -0.0 of the last group in 2:4."""
    weight = torch.tensor([[-0.0, 1.0, 0.0, 0.0], [0.0, 0.0, -0.0, -0.0], [2.0, -0.0, 3.0, 0.0]])
    restored = check(pack(weight, FORMAT_24, "w"), FORMAT_24, "w").dense()
    assert same_bits(restored[:2], weight[:2])
    assert restored[2].view(torch.int32)[1] == 0
    assert same_bits(check(pack(weight, FORMAT_BITMASK, "w"), FORMAT_BITMASK, "w").dense(), weight)


@pytest.mark.parametrize("format", FORMATS)
def test_four_bit_values_are_stored_in_words(format: str) -> None:
    weight = sparse(6, 20, torch.int8).clamp(-8, 7)
    parts = pack(weight, format, "w", 4)
    assert parts["compressed"].dtype == torch.int32
    stored = check({**parts, "weight_scale": torch.ones(6, 2)}, format, "w")
    assert (stored.bits, torch.equal(stored.dense(), weight)) == (4, True)
    nbytes = sum(part.nbytes for part in parts.values())
    assert packed_size(format, 6, 20, stored.values.numel(), 4) == nbytes
    with pytest.raises(RacError, match=r"^w\.compressed: shape .* does not fit"):
        check({**parts, "compressed": parts["compressed"][..., :-1]}, format, "w")


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2, 8), "hold more than 2 nonzeros"),
        (torch.tensor([[0.0] * 8, [0.0] * 4 + [1.0, 2, 3, 0]]), "hold more than 2 nonzeros"),
        (torch.zeros(2, 6), "6 columns are no multiple of 4"),
        (torch.zeros(0, 8), "non-empty"),
        (torch.zeros(2, 8, dtype=torch.complex64), "complex64"),
    ],
)
@pytest.mark.parametrize("block", [8, 1 << 20])
def test_what_cannot_be_packed_as_24(
    weight: torch.Tensor, message: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitmask, "_BLOCK", block)
    with pytest.raises(RacError, match=message):
        pack(weight, FORMAT_24, "some.module")


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
    "shape other columns": ("bitmask", changed("shape", put(1, 64))),
    "shape float": ("shape", changed("shape", lambda t: t.float())),
    "bitmask int8": ("bitmask", changed("bitmask", lambda t: t.view(torch.int8))),
    "bitmask short": ("bitmask", changed("bitmask", lambda t: t[:, :-1])),
    "a bit flipped": (
        "(bitmask|row_offsets)",
        changed("bitmask", lambda t: put(0, t[0, 0] ^ 1)(t)),
    ),
    "bits beyond K": ("bitmask", changed("bitmask", lambda t: put(2, 0x8A)(t))),
    "values short": ("compressed", changed("compressed", lambda t: t[..., :-1])),
    "values long": ("compressed", changed("compressed", lambda t: torch.cat([t, t], dim=-1))),
    "values int64": ("compressed", changed("compressed", lambda t: t.long())),
    "values NaN": ("compressed", changed("compressed", put(3, float("nan")))),
    "no values": ("compressed", without("compressed")),
    "no bitmask": ("bitmask", without("bitmask")),
}
OFFSETS = {
    "missing": without("row_offsets"),
    "out of range": changed("row_offsets", put(1, 10**9)),
    "not monotone": changed("row_offsets", lambda t: t.flip(0)),
    "too few": changed("row_offsets", lambda t: t[:-1]),
    "int32": changed("row_offsets", lambda t: t.int()),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("format", FORMATS)
def test_damage_is_refused_by_name(format: str, case: str) -> None:
    weight = torch.tensor([[0, 1.0, 0, 2] * 5] * 6)  # K = 20: three bytes, the last one half used
    part, damage = DAMAGE[case]
    with pytest.raises(RacError, match=rf"^some\.module\.{part}: "):
        check(damage(pack(weight, format, "w")), format, "some.module")


@pytest.mark.parametrize("case", OFFSETS)
def test_damaged_offsets_are_refused(case: str) -> None:
    parts = OFFSETS[case](pack(torch.eye(6, 20), FORMAT_BITMASK, "w"))
    with pytest.raises(RacError, match=r"^some\.module\.row_offsets"):
        check(parts, FORMAT_BITMASK, "some.module")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_of_eight_bits_is_refused(dtype: torch.dtype) -> None:
    parts = pack(sparse(4, 8, dtype), FORMAT_BITMASK, "w")
    largest = torch.finfo(dtype).max
    parts["compressed"][0] = torch.tensor(largest).to(dtype)
    check(parts, FORMAT_BITMASK, "w", scaled=False)
    parts["compressed"][0] = torch.tensor(float("nan")).to(dtype)
    with pytest.raises(RacError, match=r"^w\.compressed: holds values that are not finite"):
        check(parts, FORMAT_BITMASK, "w", scaled=False)


@pytest.mark.parametrize("format", FORMATS)
def test_shape_may_be_flat_or_a_column(format: str) -> None:
    weight = torch.tensor([[0, 1.0, 0, 2]])
    parts = pack(weight, format, "w")
    for shape in (parts["shape"].reshape(2), parts["shape"].reshape(2, 1)):
        assert torch.equal(check({**parts, "shape": shape}, format, "w").dense(), weight)
