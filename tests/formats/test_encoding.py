"""Codes against compressed-tensors' own arithmetic."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize

from rac_modifier.formats.encoding import NVFP4, Encoding, Steps
from tests.quantization.quantization_reference import GRIDS, HALF_RANGE

TYPES = {"int4": torch.int8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
PRESETS = {"int4": "W4A16", "int8": "W8A8", "fp8": "FP8_DYNAMIC"}


def their_args(name: str, **changes):
    return preset_name_to_scheme(PRESETS[name], ["Linear"]).weights.model_copy(update=changes)


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_those_of_compressed_tensors(name):
    scaled = torch.randn(64, 64) * 200
    # halves go to even, and what is too large is clamped
    scaled[0, :6] = torch.tensor([0.5, 1.5, -0.5, -2.5, 1e4, -1e4])
    unit = torch.ones(64, 1)
    args = their_args(name, strategy="channel", group_size=None)
    theirs = their_quantize(scaled, unit, torch.zeros_like(unit), args, dtype=TYPES[name])
    assert torch.equal(GRIDS[name].codes_(scaled.clone()), theirs.float())
    assert GRIDS[name].half_range == HALF_RANGE[name]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_and_scale_survives_the_models_dtype(dtype, bits):
    codes = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).double()
    scales = (torch.rand(500, 1) * 0.01 + 1e-3).to(dtype)
    weight = (codes * scales.double()).to(dtype)
    args = their_args("int8", num_bits=bits)

    def codes_of(weight):
        zero = torch.zeros_like(scales)
        return their_quantize(weight, scales, zero, args, dtype=torch.int8).double()

    assert torch.equal(codes_of(weight.float()), codes.expand_as(weight))
    # why weights are widened before they are compressed: 8 bits of mantissa do not hold 8 of code
    exact = dtype != torch.bfloat16 or bits == 4
    assert torch.equal(codes_of(weight), codes.expand_as(weight)) == exact


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_points_with_zero_points_are_those_of_compressed_tensors(bits):
    weight = torch.randn(8, 96) * 2 ** (bits - 1)
    scale = torch.rand(8, 3) + 0.5
    zero = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (8, 3))
    weight[0, :4] = torch.tensor([0.5, 1.5, -0.5, -2.5]) * scale[0, 0]  # halves go to even codes
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=32, symmetric=False)
    theirs = fake_quantize(weight, scale, zero.to(torch.int8), args)
    grid = Encoding("int", bits, 32, symmetric=False)
    steps = Steps(scale.T, zero.T.float()).spread(grid, 96)
    assert torch.equal(grid.round_(weight.T.clone(), steps.scale, steps.zero).T, theirs)
    by_column = [grid.round_(weight[:, j].clone(), *steps.of(j)) for j in range(96)]
    assert torch.equal(torch.stack(by_column, dim=1), theirs)


@pytest.mark.parametrize(("group_size", "groups"), [(None, 1), (16, 3), (20, 3), (48, 1)])
def test_each_group_of_columns_has_a_scale(group_size, groups):
    grid = Encoding("int", 4, group_size)
    assert grid.groups(48) == groups
    expected = [float(column // (group_size or 48)) for column in range(48)]
    scales = torch.arange(float(groups)).unsqueeze(1)
    assert grid.column_scales(scales, 48)[:, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stored_scale_is_never_zero(dtype):
    scales = torch.tensor([0.0, 1e-30, 0.1, -0.1])
    rounded = GRIDS["int4"].stored(scales, dtype)
    assert rounded.dtype == scales.dtype
    assert torch.equal(rounded, rounded.to(dtype).to(scales.dtype))
    assert (rounded > 0).tolist() == [True, True, True, False]
    assert float(rounded[3]) == -float(rounded[2])
    assert float(rounded[2]) == pytest.approx(0.1, rel=float(torch.finfo(dtype).eps))


@pytest.mark.parametrize(
    ("grid", "codes"),
    [
        (Encoding("int", 4), [float(code) for code in range(-8, 8)]),
        (NVFP4, [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        (Encoding("float", 8), [c.float().item() for c in torch.arange(127, dtype=torch.uint8).view(
            torch.float8_e4m3fn)]),
    ],
)  # fmt: skip
def test_the_gap_towards_zero_leads_to_the_next_code(grid, codes):
    nearer = {code: max((c for c in codes if c < code), default=0.0) for code in codes if code > 0}
    gaps = grid.gap_towards_zero(torch.tensor([*nearer]))
    assert gaps.tolist() == [code - before for code, before in nearer.items()]
