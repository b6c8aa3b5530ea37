"""Codes against compressed-tensors' own arithmetic, and the search for scales against trying them one by one."""

import itertools

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize

from rac_modifier.quantization.grid import Grid, Steps, search_scales, stored
from tests.quantization.quantization_reference import GRIDS, HALF_RANGE, nearest_code, problem

TYPES = {"int4": torch.int8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
PRESETS = {"int4": "W4A16", "int8": "W8A8", "fp8": "FP8_DYNAMIC"}


def their_args(name: str, **changes):
    return preset_name_to_scheme(PRESETS[name], ["Linear"]).weights.model_copy(update=changes)


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_those_of_compressed_tensors(name):
    generator = torch.Generator().manual_seed(0)
    scaled = torch.randn(64, 64, generator=generator) * 200
    scaled[0, :6] = torch.tensor(
        [0.5, 1.5, -0.5, -2.5, 1e4, -1e4]
    )  # halves go to even, and what is too large is clamped
    one = torch.ones(64, 1)
    args = their_args(name, strategy="channel", group_size=None)
    theirs = their_quantize(scaled, one, torch.zeros_like(one), args, dtype=TYPES[name])
    assert torch.equal(GRIDS[name].codes_(scaled.clone()), theirs.float())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_and_scale_survives_the_models_dtype(dtype, bits):
    codes = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).double()
    scales = (torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) * 0.01 + 1e-3).to(
        dtype
    )
    weight = (codes * scales.double()).to(dtype)
    args = their_args("int8", num_bits=bits)

    def codes_of(weight):
        return their_quantize(
            weight, scales, torch.zeros_like(scales), args, dtype=torch.int8
        ).double()

    assert torch.equal(codes_of(weight.float()), codes.expand_as(weight))
    # why weights are widened before they are compressed: 8 bits of mantissa do not hold 8 bits of code
    assert torch.equal(codes_of(weight), codes.expand_as(weight)) == (
        dtype != torch.bfloat16 or bits == 4
    )


def test_rounding_is_in_place_and_scales_broadcast():
    weight = torch.tensor([[0.26, -0.9], [1.3, 7.0]])
    result = Grid("int", 4).round_(weight, torch.tensor([0.5, 1.0]))
    assert result is weight
    assert weight.tolist() == [[0.5, -1.0], [1.5, 7.0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_points_with_zero_points_are_those_of_compressed_tensors(bits):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(8, 96, generator=generator) * 2 ** (bits - 1)
    scale = torch.rand(8, 3, generator=generator) + 0.5
    zero = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (8, 3), generator=generator)
    weight[0, :4] = torch.tensor([0.5, 1.5, -0.5, -2.5]) * scale[0, 0]  # halves go to even codes
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=32, symmetric=False)
    theirs = fake_quantize(weight, scale, zero.to(torch.int8), args)
    grid = Grid("int", bits, 32, symmetric=False)
    steps = Steps(scale.T, zero.T.float()).spread(grid, 96)
    assert torch.equal(grid.round_(weight.T.clone(), steps.scale, steps.zero).T, theirs)
    assert torch.equal(grid.codes_(weight.T / steps.scale, steps.zero) * steps.scale, theirs.T)
    one = [grid.round_(weight[:, j].clone(), *steps.of(j)) for j in range(96)]
    assert torch.equal(torch.stack(one, dim=1), theirs)


@pytest.mark.parametrize(
    ("kind", "bits", "half"), [("int", 4, 7.5), ("int", 8, 127.5), ("float", 8, 448.0)]
)
def test_half_range(kind, bits, half):
    assert Grid(kind, bits).half_range == half


@pytest.mark.parametrize(("group_size", "groups"), [(None, 1), (16, 3), (20, 3), (48, 1)])
def test_one_scale_per_group_of_columns(group_size, groups):
    grid = Grid("int", 4, group_size)
    assert grid.groups(48) == groups
    scales = torch.arange(float(groups)).unsqueeze(1)
    expected = [float(column // (group_size or 48)) for column in range(48)]
    assert grid.column_scales(scales, 48)[:, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GRIDS)
def test_the_scale_is_the_best_of_those_tried_with_either_sign(name, dtype):
    """Shares of 0.4 to 1.2 of the largest weight; the sign counts where codes are few."""
    weight, _, _, hessian = problem(rows=5, dtype=torch.float64)
    importance = hessian.diagonal()
    grid, size = GRIDS[name], GRIDS[name].group_size or 48
    chosen = search_scales(weight.T.contiguous(), grid, importance, dtype)
    assert chosen.zero is None
    assert torch.equal(chosen.scale, chosen.scale.to(dtype).double())
    signs = (1, -1) if name == "int4" else (1,)
    for row, part_of_row in enumerate(weight):
        for group, part in enumerate(part_of_row.split(size)):
            counts = importance[group * size : (group + 1) * size]
            errors = {}
            for step, sign in itertools.product(range(41), signs):
                share = sign * (0.4 + 0.02 * step)
                scale = (part.abs().max() / HALF_RANGE[name] * share).to(dtype).double()
                rounded = nearest_code(part / scale, name) * scale
                errors[float(scale)] = float((counts * (rounded - part).square()).sum())
            scale = float(chosen.scale[group, row])
            near = min(errors, key=lambda tried: abs(tried - scale))
            assert near == pytest.approx(scale, rel=1e-12)
            assert errors[near] <= min(errors.values()) * (1 + 1e-9)
    assert bool((chosen.scale < 0).any()) == (name == "int4")


def test_a_group_of_zeros_has_a_scale():
    scales = search_scales(torch.zeros(48, 3), GRIDS["int4"], torch.ones(48), torch.float16).scale
    assert scales.shape == (3, 3)
    assert bool(scales.bool().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_stored_scale_is_never_zero(dtype):
    scales = torch.tensor([0.0, 1e-30, 0.1, -0.1])
    kept = stored(scales, dtype)
    assert kept.dtype == scales.dtype
    assert torch.equal(kept, kept.to(dtype).to(scales.dtype))
    assert (kept > 0).tolist() == [True, True, True, False]
    assert float(kept[3]) == -float(kept[2])
    assert float(kept[2]) == pytest.approx(0.1, rel=float(torch.finfo(dtype).eps))
