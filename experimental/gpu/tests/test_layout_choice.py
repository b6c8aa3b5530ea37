"""Which layout a weight gets, what fits it, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from rac_gpu.layout import (
    ALL,
    BF16,
    E4M3,
    E4M3_GROUPS,
    INT4,
    INT4_FP32_SCALES,
    INT8,
    INT8_GROUPS,
    UNSTRUCTURED,
    UNSTRUCTURED_E4M3,
    UNSTRUCTURED_E4M3_GROUPS,
    UNSTRUCTURED_INT4,
    UNSTRUCTURED_INT8,
    UNSTRUCTURED_INT8_GROUPS,
    Layout,
    fits,
    layout_of,
    pack,
    units_of,
)
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight, from_dense
from tests.weights import (
    fp8_weight,
    grouped_weight,
    int4_any_weight,
    int8_weight,
    unstructured_weight,
)


def test_the_layout_follows_from_dtype_and_group():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert layout_of(dtype, 512, 512) is BF16
        assert layout_of(dtype, 512, 512, two_of_four=False) is UNSTRUCTURED
    assert layout_of(torch.int32, 128, 512, two_of_four=False) is UNSTRUCTURED_INT4[128]
    assert layout_of(torch.int32, 192, 576, two_of_four=False) is UNSTRUCTURED_INT4[64]
    assert layout_of(torch.int32, 32, 512, two_of_four=False) is None
    assert layout_of(torch.int32, 128, 512) is INT4[128]
    assert layout_of(torch.int32, 256, 512) is INT4[128]
    assert layout_of(torch.int32, 192, 576) is INT4[64]
    assert layout_of(torch.int32, 1000, 1000) is INT4[128]  # one scale per row
    assert layout_of(torch.int32, 32, 512) is None
    assert layout_of(torch.int32, 256, 512, scale_bytes=4) is INT4_FP32_SCALES[128]
    assert layout_of(torch.int32, 192, 576, scale_bytes=4) is INT4_FP32_SCALES[64]
    assert layout_of(torch.int32, 32, 512, scale_bytes=4) is None
    assert (
        layout_of(torch.int32, 128, 512, two_of_four=False, scale_bytes=4) is UNSTRUCTURED_INT4[128]
    )
    for two_of_four in (True, False):
        int8 = INT8_GROUPS if two_of_four else UNSTRUCTURED_INT8_GROUPS
        fp8 = E4M3_GROUPS if two_of_four else UNSTRUCTURED_E4M3_GROUPS
        assert layout_of(torch.int8, 512, 512, two_of_four) is (
            INT8 if two_of_four else UNSTRUCTURED_INT8
        )
        assert layout_of(torch.float8_e4m3fn, 512, 512, two_of_four) is (
            E4M3 if two_of_four else UNSTRUCTURED_E4M3
        )
        for dtype, by_group in ((torch.int8, int8), (torch.float8_e4m3fn, fp8)):
            assert layout_of(dtype, 128, 512, two_of_four) is by_group[128]
            assert layout_of(dtype, 192, 576, two_of_four) is by_group[64]
            assert layout_of(dtype, 32, 512, two_of_four) is None
        assert layout_of(torch.float8_e5m2, 512, 512, two_of_four) is None


def test_dtype_and_size_must_fit_the_layout():
    def of(layout: Layout, nbytes: int, dtype: torch.dtype) -> bool:
        return fits(
            layout, torch.empty(nbytes // dtype.itemsize, dtype=dtype, device="meta"), rows, columns
        )

    for layout in ALL:
        if layout.any_pattern:
            continue
        for rows in (1, 16, 100):
            for columns in range(8, 1200, 88):
                nbytes = layout.nbytes(rows, columns)
                assert of(layout, nbytes, layout.dtype)
                assert not of(layout, nbytes - 16, layout.dtype)
                assert not of(layout, nbytes + 16, layout.dtype)
                assert not of(layout, nbytes, torch.float32)


def test_a_weight_of_any_pattern_has_a_dtype_and_a_least_size():
    for layout, make, dtype in [
        (UNSTRUCTURED, unstructured_weight, torch.int32),
        (UNSTRUCTURED_INT8, int8_weight, torch.int8),
        (UNSTRUCTURED_INT8_GROUPS[64], partial(grouped_weight, int8_weight, 64), torch.int8),
        (UNSTRUCTURED_E4M3, fp8_weight, torch.uint16),
        (UNSTRUCTURED_INT4[64], partial(int4_any_weight, 64), torch.int16),
        (UNSTRUCTURED_INT4[128], partial(int4_any_weight, 128), torch.int64),
    ]:
        packed = pack(make(40, 200), layout)
        assert packed.dtype == dtype
        assert fits(layout, packed, 40, 200)
        assert units_of(layout, packed, 200) == packed.numel() * dtype.itemsize // 128
        assert not fits(layout, packed.view(2, -1), 40, 200)
        assert not fits(layout, packed[:-1], 40, 200)
        empty = pack(make(40, 200, 0.0), layout)
        assert fits(layout, empty, 40, 200)
        assert not fits(layout, empty, 400, 200)
        assert not fits(layout, empty, 40, 70000)
    assert (BF16.tile_rows, UNSTRUCTURED.tile_rows) == (16, 32)
    assert (BF16.expanded_rows, UNSTRUCTURED.expanded_rows) == (16, 512)
    assert (
        BF16.padded_columns(200),
        INT4[64].padded_columns(200),
        UNSTRUCTURED.padded_columns(200),
    ) == (256, 256, 256)


def integers(values: list[int], scale: Tensor) -> StoredWeight:
    return replace(from_dense(torch.tensor([values], dtype=torch.int8), "w"), scale=scale)


@pytest.mark.parametrize(
    ("weight", "layout", "problem"),
    [
        (integers([8, 0, 0, 0], torch.ones(1, 1)), INT4[128], "values outside of -8 to 7"),
        (integers([-9, 0, 0, 0], torch.ones(1, 1)), INT4[128], "values outside of -8 to 7"),
        (
            integers([1, 0, 0, 0], torch.ones(1, 1)),
            BF16,
            "values of torch.int8, which the layout 2:4 does not",
        ),
        (
            integers([1, 0, 0, 0] * 64, torch.ones(1, 8)),
            INT4[64],
            "a scale per 32 columns, where the layout has one per 64",
        ),
        (integers([1, 0, 0, 0] * 64, torch.ones(1, 2)), INT4[64], None),
        (
            integers([1, 0, 0, 0] * 64, torch.ones(1, 2)),
            INT8,
            "a scale per 128 columns, where the layout has one per row",
        ),
        (integers([127, 0, 0, -128], torch.ones(1, 1)), INT8, None),
        (integers([1, 1, 0, 1], torch.ones(1, 1)), INT8, "more than two of four"),
        (
            from_dense(torch.eye(4), "w"),
            INT8,
            "values of torch.float32, which the layout 2:4 int8 does not",
        ),
        (from_dense(torch.ones(1, 2), "w"), BF16, "more than two of four"),
        (
            from_dense(torch.eye(4), "w"),
            INT4[64],
            "values of torch.float32, which the layout 2:4 int4 does not",
        ),
    ],
)
def test_what_a_layout_does_not_hold_is_refused(weight, layout, problem):
    if problem is None:
        pack(weight, layout)
        return
    with pytest.raises(RacError, match=f"w: {problem}"):
        pack(weight, layout)


def test_zero_points_are_refused():
    weight = replace(
        integers([1, 0, 0, 0], torch.ones(1, 1)), zeros=torch.ones(1, 1, dtype=torch.uint8), bits=4
    )
    with pytest.raises(RacError, match="w: zero points, for which there is no GPU kernel"):
        pack(weight, INT4[128])
