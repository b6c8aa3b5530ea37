from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.checkpoint import bitmask
from rac_modifier.checkpoint.bitmask import (
    DTYPES,
    count_zeros,
    nonzero,
    pack_24,
    pack_unstructured,
    unpack_24,
    unpack_unstructured,
)
from rac_modifier.errors import RacError
from tests.checkpoint.checkpoint_helpers import same_bits

INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def random_weight(
    rows: int, columns: int, dtype: torch.dtype, density: float, seed: int
) -> torch.Tensor:
    """Random bit patterns (so infinities, NaNs and subnormals too), zeroed but for a share `density`."""
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns * dtype.itemsize
    weight = (
        torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
        .view(dtype)
        .view(rows, columns)
    )
    integers = weight.view(INTEGER[dtype.itemsize])
    integers[torch.rand(rows, columns, generator=generator) >= density] = 0
    return weight


def bits_of(weight: torch.Tensor) -> list[list[int]]:
    return weight.view(INTEGER[weight.element_size()]).tolist()


def slow_pack(weight: torch.Tensor) -> tuple[list[int], list[list[int]], list[int]]:
    """Values' bits in row order, bytes of the bitmask, row starts: the sparse-bitmask layout in loops."""
    values: list[int] = []
    mask, offsets = [], []
    for row in bits_of(weight):
        offsets.append(len(values))
        packed = [0] * -(-len(row) // 8)
        for column, bits in enumerate(row):
            if bits != 0:
                packed[column // 8] |= 1 << (column % 8)
                values.append(bits)
        mask.append(packed)
    return values, mask, offsets


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 41),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
    chunk=st.sampled_from([1, 30, 1 << 20]),
)
def test_unstructured_is_the_layout_of_the_loops_and_comes_back(
    rows: int, columns: int, dtype: torch.dtype, density: float, seed: int, chunk: int
) -> None:
    weight = random_weight(rows, columns, dtype, density, seed)
    before = weight.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmask, "_CHUNK", chunk)
        packed = pack_unstructured(weight)
        restored = unpack_unstructured(packed)
    assert same_bits(weight, before)
    values, mask, offsets = slow_pack(weight)
    assert packed["compressed"].dtype == dtype
    assert packed["compressed"].view(INTEGER[dtype.itemsize]).tolist() == values
    assert packed["bitmask"].tolist() == mask
    assert packed["row_offsets"].tolist() == offsets
    assert packed["shape"].tolist() == [rows, columns]
    assert same_bits(restored, weight)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 11),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    seed=st.integers(0, 1000),
    chunk=st.sampled_from([1, 30, 1 << 20]),
)
def test_24_keeps_two_of_every_group_in_order_and_comes_back(
    rows: int, groups: int, dtype: torch.dtype, density: float, seed: int, chunk: int
) -> None:
    columns = 4 * groups
    weight = random_weight(rows, columns, dtype, density, seed)
    pruned = (
        torch.rand(rows, groups, 4, generator=torch.Generator().manual_seed(seed)).argsort(dim=2)
        < 2
    )
    weight.view(INTEGER[dtype.itemsize]).masked_fill_(pruned.view(rows, columns), 0)
    before = weight.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitmask, "_CHUNK", chunk)
        packed = pack_24(weight)
        restored = unpack_24(packed)
    assert same_bits(weight, before)
    assert same_bits(restored, weight)
    assert packed["shape"].tolist() == [[rows], [columns]]
    assert packed["bitmask"].shape == (rows, -(-columns // 8))
    stored = bits_of(packed["compressed"])
    for row, (mask, bits) in enumerate(
        zip(packed["bitmask"].tolist(), bits_of(weight), strict=True)
    ):
        kept = [column for column in range(columns) if mask[column // 8] >> (column % 8) & 1]
        assert [column // 4 for column in kept] == [
            group for group in range(groups) for _ in range(2)
        ]
        assert [bits[column] for column in kept] == stored[row]
        assert mask[-1] >> (columns - 8 * (len(mask) - 1)) == 0  # no bits beyond K


def test_known_bytes() -> None:
    weight = torch.tensor([[0, 1.0, 0, 2, 3, 4, 0, 0], [0, 0, 0, 5, 0, 0, 0, 0]])
    packed = pack_24(weight)
    # Row 1 fills up with the leftmost zeros: columns 0 and 3, then 4 and 5.
    assert packed["bitmask"].tolist() == [[0b00111010], [0b00111001]]
    assert packed["compressed"].tolist() == [[1, 2, 3, 4], [0, 5, 0, 0]]
    packed = pack_unstructured(weight)
    assert packed["bitmask"].tolist() == [[0b00111010], [0b00001000]]
    assert packed["compressed"].tolist() == [1, 2, 3, 4, 5]
    assert packed["row_offsets"].tolist() == [0, 4]


def test_minus_zero_is_kept_wherever_there_is_room() -> None:
    weight = torch.tensor(
        [[-0.0, 1.0, 0.0, 0.0], [0.0, 0.0, -0.0, -0.0], [2.0, -0.0, 3.0, 0.0]], dtype=torch.bfloat16
    )
    for pack, unpack in ((pack_24, unpack_24), (pack_unstructured, unpack_unstructured)):
        restored = unpack(pack(weight))
        assert torch.equal(restored, weight)
        assert restored[:2].view(torch.int16).tolist() == weight[:2].view(torch.int16).tolist()
    # Two values leave no room for the -0.0 of the last group: 2:4 makes it +0.0, unstructured keeps it.
    assert unpack_24(pack_24(weight))[2].view(torch.int16)[1] == 0
    assert same_bits(unpack_unstructured(pack_unstructured(weight)), weight)


def test_nonzero_and_count_know_both_zeros_in_every_dtype() -> None:
    for dtype in DTYPES:
        if dtype.is_floating_point:
            weight = torch.tensor([[0.0, -0.0, 1.0, -2.0]]).to(dtype)
            assert nonzero(weight).tolist() == [[False, False, True, True]]
        else:
            weight = torch.tensor([[0, -128, 1, -2]], dtype=dtype)
            assert nonzero(weight).tolist() == [[False, True, True, True]]
        assert count_zeros(weight) == (~nonzero(weight)).sum()


def test_strided_weight() -> None:
    weight = torch.randn(16, 8).t()
    assert not weight.is_contiguous()
    assert same_bits(unpack_unstructured(pack_unstructured(weight)), weight.contiguous())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(2, 8), "first in row 0, columns 0-3"),
        (torch.tensor([[0.0] * 8, [0.0] * 4 + [1.0, 2, 3, 0]]), "first in row 1, columns 4-7"),
        (torch.zeros(2, 6), "6 columns are no multiple of 4"),
        (torch.zeros(8), r"shape \[8\]"),
        (torch.zeros(0, 8), "non-empty"),
        (torch.zeros(2, 8, dtype=torch.complex64), "complex64"),
        (torch.full((1, 4), float("nan")), "more than 2 nonzeros"),
    ],
)
def test_what_cannot_be_packed_as_24(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(RacError, match=message):
        pack_24(weight, "some.module")


def test_error_of_a_later_chunk_names_the_right_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitmask, "_CHUNK", 16)
    weight = torch.zeros(9, 8)
    weight[7, 4:] = 1
    with pytest.raises(RacError, match="row 7, columns 4-7"):
        pack_24(weight)


Parts = dict[str, torch.Tensor]


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Parts], Parts]:
    return lambda parts: {**parts, part: change(parts[part].clone())}


def put(index: int, value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[index] = value
        return tensor

    return change


HOSTILE = {
    "shape negative": ("bitmask", changed("shape", put(0, -5))),
    "shape zero": ("bitmask", changed("shape", put(1, 0))),
    "shape other rows": ("bitmask", changed("shape", put(0, 4))),
    "shape other columns": ("bitmask", changed("shape", put(1, 64))),
    "shape float": ("shape", changed("shape", lambda t: t.float())),
    "shape of three": (
        "shape",
        changed("shape", lambda t: torch.cat([t.flatten(), t.flatten()[:1]])),
    ),
    "bitmask int8": ("bitmask", changed("bitmask", lambda t: t.view(torch.int8))),
    "bitmask flat": ("bitmask", changed("bitmask", lambda t: t.flatten())),
    "bitmask short": ("bitmask", changed("bitmask", lambda t: t[:, :-1])),
    "bitmask of no rows": ("bitmask", changed("bitmask", lambda t: t[:0])),
    "a bit flipped": (
        "",
        changed("bitmask", lambda t: t ^ torch.tensor([1, 0, 0], dtype=torch.uint8)),
    ),
    "bitmask full": ("", changed("bitmask", lambda t: torch.full_like(t, 255))),
    "bits beyond K": (
        "bitmask",
        changed("bitmask", lambda t: t | torch.tensor([0, 0, 0x80], dtype=torch.uint8)),
    ),
    "values short": ("compressed", changed("compressed", lambda t: t[..., :-1])),
    "values long": ("compressed", changed("compressed", lambda t: torch.cat([t, t], dim=-1))),
    "values of three dimensions": (
        "compressed",
        changed("compressed", lambda t: t.reshape(1, 1, -1)),
    ),
    "values int64": ("compressed", changed("compressed", lambda t: t.long())),
    "no values": (
        "compressed",
        lambda parts: {k: v for k, v in parts.items() if k != "compressed"},
    ),
    "no bitmask": ("bitmask", lambda parts: {k: v for k, v in parts.items() if k != "bitmask"}),
    "no shape": ("shape", lambda parts: {k: v for k, v in parts.items() if k != "shape"}),
    "nothing": ("compressed", lambda parts: {}),
}
HOSTILE_OFFSETS = {
    "no offsets": lambda parts: {k: v for k, v in parts.items() if k != "row_offsets"},
    "offset out of range": changed("row_offsets", put(1, 10**9)),
    "offset negative": changed("row_offsets", put(1, -1)),
    "offsets not monotone": changed("row_offsets", lambda t: t.flip(0)),
    "offsets one too few": changed("row_offsets", lambda t: t[:-1]),
    "offsets int32": changed("row_offsets", lambda t: t.int()),
    "offsets 2-D": changed("row_offsets", lambda t: t.unsqueeze(0)),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("layout", ["2:4", "unstructured"])
def test_hostile_parts_are_refused_by_name(layout: str, case: str) -> None:
    weight = torch.tensor([[0, 1.0, 0, 2] * 5] * 6)  # K = 20: three bytes, the last one half used
    pack, unpack = (
        (pack_24, unpack_24) if layout == "2:4" else (pack_unstructured, unpack_unstructured)
    )
    part, damage = HOSTILE[case]
    with pytest.raises(RacError, match=rf"^some\.module\.{part}"):
        unpack(damage(pack(weight)), "some.module")


@pytest.mark.parametrize("value", [2**62, -(2**62), 2**63 - 1])
@pytest.mark.parametrize("index", [0, 1])
def test_a_huge_shape_allocates_nothing(index: int, value: int) -> None:
    for pack, unpack in ((pack_24, unpack_24), (pack_unstructured, unpack_unstructured)):
        with pytest.raises(RacError):
            unpack(changed("shape", put(index, value))(pack(torch.tensor([[0, 1.0, 0, 2]]))))


@pytest.mark.parametrize("case", HOSTILE_OFFSETS)
def test_hostile_offsets_are_refused(case: str) -> None:
    with pytest.raises(RacError, match=r"^some\.module\.row_offsets"):
        unpack_unstructured(
            HOSTILE_OFFSETS[case](pack_unstructured(torch.eye(6, 20))), "some.module"
        )


def test_shape_may_be_flat_or_a_column() -> None:
    weight = torch.tensor([[0, 1.0, 0, 2]])
    for pack, unpack in ((pack_24, unpack_24), (pack_unstructured, unpack_unstructured)):
        parts = pack(weight)
        for shape in (parts["shape"].reshape(2), parts["shape"].reshape(2, 1)):
            assert torch.equal(unpack({**parts, "shape": shape}), weight)


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (4, 0), (0, 0)])
def test_an_empty_weight_that_agrees_with_itself_is_refused(rows: int, columns: int) -> None:
    parts = {
        "compressed": torch.zeros(rows, columns // 2),
        "bitmask": torch.zeros(rows, columns // 8, dtype=torch.uint8),
        "row_offsets": torch.zeros(rows, dtype=torch.int64),
        "shape": torch.tensor([rows, columns]),
    }
    with pytest.raises(RacError, match=r"^weight\.bitmask"):
        unpack_24(parts)
    with pytest.raises(RacError, match=r"^weight\.bitmask"):
        unpack_unstructured({**parts, "compressed": torch.zeros(0)})
