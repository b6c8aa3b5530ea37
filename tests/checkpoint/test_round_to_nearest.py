"""Rounding to the nearest, against one weight at a time in float64."""

from __future__ import annotations

import pytest
import torch

from rac_modifier.checkpoint import round_to_nearest
from rac_modifier.checkpoint.round_to_nearest import (
    quantize_groups,
    quantize_rows,
)


def test_rows_get_the_scale_of_their_largest_weight() -> None:
    weight = torch.randn(5, 12)
    weight[3] = 0.0
    values, scales = quantize_rows(weight)
    assert values.dtype == torch.int8
    assert scales.shape == (5, 1)
    for row in (0, 1, 2, 4):
        largest = max(abs(x) for x in weight[row].tolist())
        assert float(scales[row]) == pytest.approx(largest / 127, rel=1e-6)
        for column in range(12):  # half a step, and the rounding of the division
            exact = float(weight[row, column]) / float(scales[row])
            assert abs(int(values[row, column]) - exact) <= 0.5 + 1e-4
        assert int(values[row].abs().max()) == 127
    assert not values[3].any()
    assert float(scales[3]) > 0


@pytest.mark.parametrize("group", [4, 8])
def test_groups_map_their_farthest_weight_to_minus_eight(group: int) -> None:
    weight = torch.randn(3, 16)
    weight[1, :group] = 0.0
    values, scales = quantize_groups(weight, group)
    assert scales.shape == (3, 16 // group)
    assert torch.equal(scales, scales.bfloat16().float())
    for row in range(3):
        for at in range(16 // group):
            part = weight[row, at * group : (at + 1) * group].tolist()
            codes = values[row, at * group : (at + 1) * group].tolist()
            if row == 1 and at == 0:
                assert codes == [0] * group
                assert float(scales[row, at]) == 0.0
                continue
            farthest = max(part, key=abs)
            assert codes[part.index(farthest)] == -8
            assert float(scales[row, at]) == pytest.approx(
                farthest / -8, rel=2**-8
            )  # bfloat16 has 8 bits
            for code, value in zip(codes, part, strict=True):
                assert -8 <= code <= 7
                exact = value / float(scales[row, at])
                assert code == 7 if exact > 7.5 else abs(code - exact) <= 0.5 + 1e-4 or exact < -8


def test_in_parts_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 8)
    whole = quantize_rows(weight), quantize_groups(weight, 4)
    monkeypatch.setattr(
        round_to_nearest.layout,
        "row_chunks",
        lambda rows, columns: [slice(i, i + 1) for i in range(rows)],
    )
    parts = quantize_rows(weight), quantize_groups(weight, 4)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
