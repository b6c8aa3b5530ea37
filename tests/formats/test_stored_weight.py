"""A stored weight against the dense one it stands for."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.checkpoint.formats import FORMATS
from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import (
    StoredWeight,
    all_stored,
    check_scale,
    count_broken_groups,
    count_zeros,
    from_dense,
    stack,
)


def random_weight(rows, columns, seed, two_of_four, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    if two_of_four:
        groups = weight.view(-1, 4)
        order = torch.rand(groups.shape, generator=generator)
        groups.scatter_(1, order.topk(2, dim=1).indices, 0.0)
    else:
        weight[torch.rand(rows, columns, generator=generator) < 0.5] = 0
    return weight.to(dtype)


def stored(weight: torch.Tensor, format: str, name: str = "layer") -> StoredWeight:
    return FORMATS[format].check(FORMATS[format].compress(weight, name), name)


def consistent(weight: StoredWeight) -> bool:
    """The four fields agree, as `check` would have it."""
    counts = [sum(int(byte).bit_count() for byte in row) for row in weight.bitmask.tolist()]
    starts = [sum(counts[:row]) for row in range(len(counts) + 1)]
    return weight.starts.tolist() == starts and weight.values.shape == (starts[-1],)


shapes = {"rows": st.integers(1, 12), "eighths": st.integers(1, 9), "seed": st.integers(0, 999)}


@settings(max_examples=60, deadline=None)
@given(format=st.sampled_from(sorted(FORMATS)), data=st.data(), **shapes)
def test_rows_and_columns(format, rows, eighths, seed, data):
    columns = 4 * eighths
    weight = random_weight(rows, columns, seed, format == "sparse-24-bitmask")
    index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=15)))
    first = data.draw(st.integers(0, columns - 1))
    count = data.draw(st.integers(1, columns - first))
    whole = stored(weight, format)
    assert consistent(whole)
    assert whole.density == whole.values.numel() / weight.numel()
    cut = whole.select_rows(index).select_columns(first, count)
    assert consistent(cut)
    assert torch.equal(cut.dense(), weight[index][:, first : first + count])


def test_stacking_what_does_not_fit():
    left = stored(random_weight(2, 8, 0, False), "sparse-bitmask", "a.q_proj")
    for right in (random_weight(2, 12, 0, False), random_weight(2, 8, 0, False, torch.float32)):
        with pytest.raises(RacError, match=r"^a\.k_proj cannot be fused with a\.q_proj: "):
            stack([left, stored(right, "sparse-bitmask", "a.k_proj")], "a")


def test_quantized_values_come_with_their_scales():
    weight = torch.tensor([[3, 0, 0, -7, 0, 1, 2, 0]], dtype=torch.int8)
    tensors = FORMATS["sparse-bitmask"].compress(weight, "x")
    scaled = {**tensors, "weight_scale": torch.tensor([[0.5, 2.0]])}
    assert FORMATS["sparse-bitmask"].check(scaled, "x").dequantized(torch.float32).tolist() == [
        [1.5, 0, 0, -3.5, 0, 2, 4, 0]
    ]
    three = FORMATS["sparse-bitmask"].compress(weight.repeat(3, 1), "x")
    for scale, per_block in ((torch.ones(2, 3), True), (torch.ones(3, 2), False)):
        read = FORMATS["sparse-bitmask"].check({**three, "weight_scale": scale}, "x", True)
        assert (read.scale is None) == read.per_block == per_block
    with pytest.raises(RacError, match=r"x\.weight_scale: missing"):
        FORMATS["sparse-bitmask"].check(tensors, "x")


def test_two_of_four_looks_at_each_four():
    for row, expected in (
        ([1, 1, 0, 0, 0, 0, 1, 1], True),
        ([1, 0, 1, 1, 0, 0, 0, 0], False),
        ([0, 0, 0, 0, 1, 0], False),
    ):
        assert from_dense(torch.tensor([[0.0] * len(row), row]), "w").two_of_four is expected


@pytest.mark.parametrize("format", FORMATS)
def test_four_bit_values_stay_known_as_such(format):
    floats = random_weight(6, 64, 0, format == "sparse-24-bitmask", torch.float32)
    weight = (3 * floats).round().clamp(-7, 7).to(torch.int8)
    scale = {"weight_scale": torch.ones(6, 2, dtype=torch.bfloat16)}
    parts = {**FORMATS[format].compress(weight, "a", 4), **scale}
    four = FORMATS[format].check(parts, "a")
    assert (four.bits, four.group_bytes) == (4, 2)
    # 0.1 in float32 is no bfloat16
    assert replace(four, scale=torch.full((6, 2), 0.1)).group_bytes == 4
    plain = {**FORMATS[format].compress(weight, "a"), "weight_scale": torch.ones(6)}
    assert FORMATS[format].check(plain, "a").bits == 8
    cut = stack([four, four.select_rows(torch.tensor([4, 1]))], "both").select_columns(32, 24)
    assert (cut.bits, cut.group) == (4, 8)
    assert torch.equal(cut.dense(), weight[[0, 1, 2, 3, 4, 5, 4, 1], 32:56])
    with pytest.raises(RacError, match="cannot be fused"):
        stack([four, replace(four, bits=8)], "both")


def test_codes_of_zero_are_cut_with_their_rows_and_groups():
    weight = all_stored(torch.randint(-7, 8, (6, 64), dtype=torch.int8), "a")
    zeros = torch.randint(0, 16, (6, 2), dtype=torch.uint8)
    weight = replace(weight, scale=torch.rand(6, 2), bits=4, zeros=zeros)
    assert weight.group_bytes == 5
    cut = stack([weight, weight], "b").select_rows(torch.tensor([7, 2])).select_columns(16, 32)
    assert cut.zeros is not None
    assert cut.zeros.tolist() == zeros[1:3].tolist()
    assert torch.equal(cut.scale, torch.stack([weight.scale[1], weight.scale[2]]))
    with pytest.raises(RacError, match="cannot be fused"):
        stack([weight, replace(weight, zeros=None)], "both")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(6, dtype=torch.int16), "torch.int16, not floats"),
        (torch.tensor([1.0, float("nan"), 1, 1, 1, 1]), "NaN or infinite"),
        (torch.tensor([1.0, 0.0, 1, 1, 1, 1]), "a scale is zero"),
        (torch.ones(5), "does not fit"),
        (torch.ones(6, 3), "does not fit"),
        (None, "missing, but its values are torch.int8"),
    ],
)
def test_scales_that_are_refused(scale, message):
    with pytest.raises(RacError, match=rf"^a\.weight_scale: .*{message}"):
        check_scale({} if scale is None else {"weight_scale": scale}, torch.int8, 6, 8, "a")


@pytest.mark.parametrize("scale", [-torch.ones(6), torch.ones(1), torch.ones(6, 4)])
def test_scales_that_are_taken(scale):
    """Negative ones too, which AutoRound writes."""
    actual = check_scale({"weight_scale": scale}, torch.int8, 6, 8, "a")
    assert actual is not None
    assert torch.equal(actual.mean(dim=1), scale.flatten()[:1].expand(6))
    with pytest.raises(RacError, match="unexpected, as the values are"):
        check_scale({"weight_scale": scale}, torch.float32, 6, 8, "a")


@pytest.mark.parametrize("structure", ["2:4", "1:3", "4:8", "unstructured"])
def test_zeros_and_broken_groups_are_those_of_the_dense_weight(structure):
    weight = random_weight(5, 48, 1, False)
    weight[0, ::5] = -0.0
    form = from_dense(weight, "a")
    assert count_zeros(form) == count_zeros(weight) == int((weight == 0).sum())
    broken = count_broken_groups(form, structure, "a")
    assert broken == count_broken_groups(weight, structure, "a")
    if structure == "unstructured":
        assert broken == 0
    else:
        n, m = map(int, structure.split(":"))
        assert broken == int(((weight == 0).view(-1, m).sum(dim=1) < n).sum())
