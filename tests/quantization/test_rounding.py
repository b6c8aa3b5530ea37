"""Rounding against compressed-tensors' own arithmetic, and against slow references."""

import pytest
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.pruning.linalg import Dampening
from rac_modifier.pruning.sparsegpt import factorise
from rac_modifier.quantization.grid import Grid, search_scales
from rac_modifier.quantization.rounding import descend, gptq
from rac_modifier.quantization.solve import quantize

GRIDS = {"int4": Grid("int", 4, 16), "int8": Grid("int", 8), "fp8": Grid("float", 8)}


def their_args(grid: Grid):
    """compressed-tensors' scheme of the same grid."""
    preset = {4: "W4A16", 8: "W8A8"}[grid.bits] if grid.kind == "int" else "FP8_DYNAMIC"
    args = preset_name_to_scheme(preset, ["Linear"]).weights
    return args.model_copy(update={"group_size": grid.group_size}) if grid.group_size else args


def problem(rows=12, d=48, seed=0, sparsity=0.5):
    """Pruned weights with their mask, target and Hessian, of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, d, generator=generator) @ torch.randn(d, d, generator=generator)
    target = torch.randn(rows, d, generator=generator)
    keep = torch.rand(rows, d, generator=generator) >= sparsity
    return target * keep, keep, target, 2 * x.T @ x / len(x)


def error_of(weight, target, hessian):
    change = (weight - target).double()
    return float((change @ hessian.double() * change).sum())


def run(grid, dtype=torch.float32, **changes):
    weight, keep, target, hessian = problem(**changes)
    (result,) = quantize([weight], [keep], [target], hessian, grid, names=["w"], dtype=dtype)
    return result, keep, target, hessian


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upstream_saves_exactly_the_codes_that_were_chosen(name, dtype):
    """What llm-compressor stores is quantize(weight, scale): it must not round anew. In bfloat16 it would, see int8 below."""
    grid = GRIDS[name]
    result, keep, _, _ = run(grid, dtype, rows=64)
    stored = torch.int8 if grid.kind == "int" else torch.float8_e4m3fn
    codes = their_quantize(
        result.weight.float(), result.scale, torch.zeros_like(result.scale), their_args(grid), dtype=stored
    )
    spread = result.scale.double().repeat_interleave(grid.group_size or 48, dim=1)
    wanted = grid.codes_(result.weight.double() / spread)
    assert torch.equal(codes.double(), wanted)
    assert torch.equal((codes.double() * spread).to(dtype), result.weight)
    assert not codes.double()[~keep].any()
    assert codes.double()[keep].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_code_and_scale_survives_the_models_dtype(dtype, bits):
    codes = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).double()
    scales = (torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) * 0.01 + 1e-3).to(dtype)
    weight = (codes * scales.double()).to(dtype)
    args = their_args(Grid("int", 8)).model_copy(update={"num_bits": bits})

    def codes_of(weight):
        return their_quantize(weight, scales, torch.zeros_like(scales), args, dtype=torch.int8).double()

    assert torch.equal(codes_of(weight.float()), codes.expand_as(weight))
    # why weights are widened before they are compressed: 8 bits of mantissa do not hold 8 bits of code
    assert torch.equal(codes_of(weight), codes.expand_as(weight)) == (dtype != torch.bfloat16 or bits == 4)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(GRIDS)), st.integers(0, 100), st.sampled_from([0.0, 0.5, 0.8]))
def test_pruned_weights_stay_zero_and_the_error_beats_rounding_to_nearest(name, seed, sparsity):
    grid = GRIDS[name]
    weight, keep, target, hessian = problem(seed=seed, sparsity=sparsity)
    target = weight  # so that rounding is all that is lost
    (result,) = quantize([weight], [keep], [target], hessian, grid, names=["w"], dtype=torch.float32)
    assert not result.weight[~keep].any()
    nearest = weight.T.clone()
    largest = torch.stack([part.abs().amax(0) for part in nearest.split(grid.group_size or 48)]) / grid.half_range
    nearest = grid.round_(nearest, grid.column_scales(largest.clamp(min=1e-9), 48)).T
    assert error_of(result.weight, target, hessian) < error_of(nearest, target, hessian)
    whole = error_of(torch.zeros_like(target), target, hessian)
    assert result.relative_error == pytest.approx(error_of(result.weight, target, hessian) / whole, rel=1e-3)


def slow_gptq(weight, keep, scales, grid, hessian, frac):
    """Column by column with the inverse Hessian, as in the paper; pruned columns round to zero. All [rows, d]."""
    weight, d = weight.double().clone(), weight.shape[1]
    damped = hessian.double() + frac * hessian.diagonal().double().mean() * torch.eye(d)
    r = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for j in range(d):
        column = weight[:, j].clone()
        rounded = grid.round_(column.clone(), scales[:, j].double()) * keep[:, j]
        weight[:, j:] -= ((column - rounded) / r[j, j]).unsqueeze(1) * r[j, j:]
        weight[:, j] = rounded
    return weight


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_is_the_papers_column_loop(name):
    grid = GRIDS[name]
    weight, keep, _, hessian = problem(d=176, rows=5)  # more than one block
    scales = grid.column_scales(search_scales(weight.T, grid, hessian.diagonal(), torch.float32), 176)
    working = weight.T.clone()
    gptq(working, keep.T.float(), scales, grid, factorise(hessian, 0.01, "w"))
    slow = slow_gptq(weight, keep, scales.T, grid, hessian, 0.01)
    differ = (working.T - slow).abs() > 1e-4
    assert int(differ.any(dim=1).sum()) <= 1  # float32 may round one row another way at a tie


def slow_sweep(weight, target, keep, scales, grid, hessian, dampening):
    weight = weight.double().clone()
    damped = hessian.double() + torch.diag(dampening.added.double())
    for j in range(weight.shape[1]):
        gradient = (weight - target.double()) @ damped[:, j]
        best = weight[:, j] - gradient / damped[j, j]
        weight[:, j] = grid.round_(best, scales[:, j].double()) * keep[:, j]
    return weight


@pytest.mark.parametrize("name", GRIDS)
def test_a_sweep_is_coordinate_descent_over_the_kept_weights(name):
    grid = GRIDS[name]
    weight, keep, target, hessian = problem(d=176, rows=5)
    scales = grid.column_scales(search_scales(weight.T, grid, hessian.diagonal(), torch.float32), 176)
    start = grid.round_(weight.T.clone(), scales)
    dampening = Dampening.of(hessian, 0.01)
    working = start.clone()
    descend(working, target.T, keep.T.float(), scales, grid, hessian, dampening, 1)
    slow = slow_sweep(start.T, target, keep, scales.T, grid, hessian, dampening)
    assert int(((working.T - slow).abs() > 1e-4).any(dim=1).sum()) <= 1
    assert error_of(working.T, target, hessian) < error_of(start.T, target, hessian)


def test_modules_that_share_a_hessian_get_what_they_would_get_alone():
    weight, keep, target, hessian = problem(rows=24)
    args = {"names": ["w"], "dtype": torch.bfloat16}
    both = quantize(
        [weight[:8], weight[8:]], [keep[:8], keep[8:]], [target[:8], target[8:]], hessian, GRIDS["int4"],
        **{**args, "names": ["a", "b"]},
    )  # fmt: skip
    for part, rows in zip(both, (slice(0, 8), slice(8, 24)), strict=True):
        (alone,) = quantize([weight[rows]], [keep[rows]], [target[rows]], hessian, GRIDS["int4"], **args)
        assert torch.equal(alone.weight, part.weight)
        assert torch.equal(alone.scale, part.scale)


def test_rows_without_a_kept_weight_and_dead_inputs_stay_zero():
    weight, keep, target, hessian = problem()
    keep[3] = False
    hessian[5], hessian[:, 5] = 0.0, 0.0
    keep[:, 5] = False
    (result,) = quantize([weight], [keep], [target], hessian, GRIDS["int4"], names=["w"], dtype=torch.bfloat16)
    assert not result.weight[3].any()
    assert not result.weight[:, 5].any()
    assert bool((result.scale > 0).all())


def test_groups_that_do_not_divide_the_inputs_are_refused():
    weight, keep, target, hessian = problem(d=40)
    with pytest.raises(RacError, match="40 inputs are no multiple of the group_size 16"):
        quantize([weight], [keep], [target], hessian, GRIDS["int4"], names=["w"], dtype=torch.float32)
