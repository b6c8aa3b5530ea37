from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import quantize as their_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.pruning import Pattern
from rac_modifier.pruning import solve as prune
from rac_modifier.pruning.linalg import Dampening, factorise
from rac_modifier.quantization import solve
from rac_modifier.quantization.grid import Grid
from rac_modifier.quantization.solve import PrunedProblem, quantize, quantize_many
from tests.pruning.pruning_reference import assert_near, dampened, quadratic_tolerance
from tests.quantization.quantization_reference import GRIDS, error_of, nearest, problem, solved


def their_args(grid: Grid):
    """compressed-tensors' scheme of the same grid."""
    preset = {4: "W4A16", 8: "W8A8"}[grid.bits] if grid.kind == "int" else "FP8_DYNAMIC"
    args = preset_name_to_scheme(preset, ["Linear"]).weights
    return args.model_copy(update={"group_size": grid.group_size}) if grid.group_size else args


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upstream_saves_exactly_the_codes_that_were_chosen(name, dtype):
    """llm-compressor stores quantize(weight, scale), which must not round anew. In bfloat16 it would, see test_grid.py."""
    grid = GRIDS[name]
    weight, keep, target, hessian = problem(rows=64)
    (result,) = quantize([solved(weight, keep, target)], hessian, [grid], dtype=dtype)
    stored = torch.int8 if grid.kind == "int" else torch.float8_e4m3fn
    codes = their_quantize(
        result.weight.float(),
        result.scale,
        torch.zeros_like(result.scale),
        their_args(grid),
        dtype=stored,
    )
    spread = result.scale.double().repeat_interleave(grid.group_size or 48, dim=1)
    wanted = grid.codes_(result.weight.double() / spread)
    assert torch.equal(codes.double(), wanted)
    assert torch.equal((codes.double() * spread).to(dtype), result.weight)
    assert not codes.double()[~keep].any()
    assert codes.double()[keep].any()


@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "in the order of rounding alone"])
@pytest.mark.parametrize("name", [*GRIDS, "zero points"])
def test_problems_that_are_rounded_at_once_get_the_bits_that_they_get_alone(
    name, pruned, monkeypatch
):
    """Each has two modules of an odd number of rows, one of them on another grid; the others' weights do not matter."""
    grids = [GRIDS.get(name, Grid("int", 4, 16, symmetric=False)), Grid("int", 8, 16)]
    problems, calls, inner = [], [], solve.gptq

    def counted(weight, *args):
        calls.append(weight.shape)
        return inner(weight, *args)

    monkeypatch.setattr(solve, "gptq", counted)
    for seed in range(3):
        weight, keep, target, hessian = problem(rows=50, d=176, seed=seed, sparsity=0.5 * pruned)
        factor = (
            factorise(hessian, Dampening.of(hessian, 0.01 * (1 + seed)), "w") if pruned else None
        )
        parts = zip("ab", *(t.split([37, 13]) for t in (weight, keep, target)), strict=True)
        found = [replace(solved(w, k, t, module), factor=factor) for module, w, k, t in parts]
        problems.append(PrunedProblem(found, hessian, grids))
    together = quantize_many(problems, dtype=torch.bfloat16)
    assert calls == [(3, 176, 37), (3, 176, 13)]
    for one, results in zip(problems, together, strict=True):
        alone = quantize(one.solutions, one.hessian, grids, dtype=torch.bfloat16)
        for a, b in zip(alone, results, strict=True):
            assert torch.equal(a.weight, b.weight)
            assert torch.equal(a.scale, b.scale)
            assert (a.zero_point is None) == (b.zero_point is None)
            assert a.zero_point is None or torch.equal(a.zero_point, b.zero_point)
            assert a.relative_error == b.relative_error
    assert not torch.equal(together[0][0].weight, together[1][0].weight)


def test_problems_of_other_shapes_or_grids_are_rounded_one_after_the_other():
    grid, problems = Grid("int", 4, 16), []
    for rows, of_second in ((8, grid), (12, grid), (8, None)):
        weight, keep, target, hessian = problem(rows=rows, seed=rows)
        solutions = [solved(weight, keep, target, "a"), solved(weight, keep, target, "b")]
        problems.append(PrunedProblem(solutions, hessian, [grid, of_second]))
    found = quantize_many(problems, dtype=torch.float32)
    assert [[None if one is None else len(one.weight) for one in results] for results in found] == [
        [8, 8],
        [12, 12],
        [8, None],
    ]
    for one, results in zip(problems, found, strict=True):
        alone = quantize(one.solutions, one.hessian, one.grids, dtype=torch.float32)
        assert torch.equal(alone[0].weight, results[0].weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, None])
def test_zero_points_survive_upstreams_packing_bit_for_bit(bits, dtype, size):
    """What was measured is what compressed-tensors decompresses from the int32 words that it made of it."""
    weight, _, target, hessian = problem(rows=40, sparsity=0.0)
    weight, target = weight + 0.3, target + 0.3
    keep = torch.ones_like(weight, dtype=torch.bool)
    keep[:, 5] = False  # a dead input, whose weights are zero: codes of the zero point
    grid = Grid("int", bits, size, symmetric=False)
    (result,) = quantize([solved(weight, keep, target)], hessian, [grid], dtype=dtype)
    assert result.zero_point.dtype == torch.int8
    assert result.zero_point.shape == result.scale.shape == (40, 48 // (size or 48))
    assert len(result.zero_point.unique()) > 1
    assert not result.weight[:, 5].any()
    arguments = (
        {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    )
    scheme = QuantizationScheme(
        targets=["Linear"],
        format="pack-quantized",
        weights=QuantizationArgs(num_bits=bits, symmetric=False, **arguments),
    )
    state = {
        "weight": result.weight.float(),
        "weight_scale": result.scale,
        "weight_zero_point": result.zero_point,
    }
    stored = PackedQuantizationCompressor.compress(state, scheme)
    assert stored["weight_zero_point"].dtype == torch.int32
    again = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert again.dtype == dtype
    assert torch.equal(again, result.weight)


def test_zero_points_lower_the_error_of_lopsided_weights():
    weight, _, _, hessian = problem(rows=24, sparsity=0.0)
    weight = weight.abs()
    solution = solved(weight, torch.ones_like(weight, dtype=torch.bool), weight)
    symmetric, asymmetric = (
        quantize([solution], hessian, [Grid("int", 3, 16, symmetric=form)], dtype=torch.float32)[0]
        for form in (True, False)
    )
    assert symmetric.zero_point is None
    assert asymmetric.relative_error < 0.6 * symmetric.relative_error


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(GRIDS)), st.integers(0, 100), st.sampled_from([0.0, 0.5, 0.8]))
def test_pruned_weights_stay_zero_and_the_error_beats_rounding_to_nearest(name, seed, sparsity):
    weight, keep, _, hessian = problem(seed=seed, sparsity=sparsity)
    target = weight  # so that rounding is all that is lost
    (result,) = quantize(
        [solved(weight, keep, target)], hessian, [GRIDS[name]], dtype=torch.float32
    )
    assert not result.weight[~keep].any()
    assert not (result.weight.signbit() & (result.weight == 0)).any()
    error = error_of(result.weight, target, hessian)
    assert error < error_of(nearest(weight, name), target, hessian)
    whole = error_of(torch.zeros_like(target), target, hessian)
    tolerance = quadratic_tolerance(target - result.weight, hessian) / whole
    assert result.relative_error == pytest.approx(error / whole, abs=tolerance, rel=1e-5)
    assert tolerance < 1e-2 * error / whole


def test_modules_that_share_a_hessian_get_what_they_would_get_alone():
    weight, keep, target, hessian = problem(rows=24, dtype=torch.float64)
    parts = [solved(weight[rows], keep[rows], target[rows]) for rows in (slice(8), slice(8, 24))]
    grid = GRIDS["int4"]
    for part, together in zip(
        parts, quantize(parts, hessian, [grid, grid], dtype=torch.bfloat16), strict=True
    ):
        (alone,) = quantize([part], hessian, [grid], dtype=torch.bfloat16)
        assert torch.equal(alone.weight, together.weight)
        assert torch.equal(alone.scale, together.scale)


def test_each_module_has_its_own_grid_and_one_without_is_left_as_it_is():
    weight, keep, target, hessian = problem(rows=24, dtype=torch.float64)
    parts = [
        solved(weight[rows], keep[rows], target[rows])
        for rows in (slice(8), slice(8, 16), slice(16, 24))
    ]
    first, none, last = quantize(
        parts, hessian, [GRIDS["int4"], None, GRIDS["int8"]], dtype=torch.float32
    )
    assert none is None
    assert first.scale.shape == (8, 3)
    assert last.scale.shape == (8, 1)
    (alone,) = quantize(parts[2:], hessian, [GRIDS["int8"]], dtype=torch.float32)
    assert torch.equal(alone.weight, last.weight)
    assert alone.relative_error == pytest.approx(last.relative_error, rel=1e-9)


def test_the_factor_of_the_pruning_is_used_again_with_its_dampening():
    weight, _, _, hessian = problem(rows=8, dtype=torch.float64)
    solutions = prune("sparsegpt", [weight], hessian, Pattern.n_of_m(2, 4), dampening_frac=0.3)
    args = {"hessian": hessian, "grids": [GRIDS["int8"]], "dtype": torch.float32}
    (ours,) = quantize(solutions, dampening_frac=0.01, **args)
    bare = solved(solutions[0].weight, solutions[0].mask, solutions[0].target)
    same, other = (
        quantize(
            [replace(bare, factor=factorise(hessian, Dampening.of(hessian, frac), "w"))], **args
        )[0]
        for frac in (0.3, 0.01)
    )
    assert torch.equal(ours.weight, same.weight)
    assert not torch.equal(ours.weight, other.weight)


@pytest.mark.parametrize("cross", [False, True])
def test_dense_weights_are_rounded_in_the_order_of_falling_second_moments(cross):
    """With the dense target the factor comes from `solve`, else it is made here; scales stay those of neighbouring columns."""
    weight, _, _, hessian = problem(rows=8, dtype=torch.float64)
    moment = [0.01 * weight @ hessian] if cross else None
    (solution,) = prune("none", [weight], hessian, Pattern.nothing(), cross_moment=moment)
    grid = GRIDS["int4"]
    (found,) = quantize([solution], hessian, [grid], dtype=torch.float32, sweeps=0)
    target = weight + (
        0.01 * weight @ hessian @ torch.linalg.inv(dampened(hessian, 0.01)) if cross else 0.0
    )
    order = sorted(range(48), key=lambda j: -float(hessian[j, j]))
    scale = found.scale.repeat_interleave(16, dim=1).double()
    r = torch.linalg.cholesky(
        torch.linalg.inv(dampened(hessian, 0.01))[order][:, order], upper=True
    )
    left = target[:, order].clone()
    for j, column in enumerate(order):
        point = (left[:, j] / scale[:, column]).round().clamp(-8, 7) * scale[:, column]
        left[:, j:] -= ((left[:, j] - point) / r[j, j]).unsqueeze(1) * r[j, j:]
        left[:, j] = point
    assert_near(found.weight[:, order].double(), left, 1e-6)


def test_sweeps_lower_the_error():
    weight, keep, target, hessian = problem(rows=24)
    errors = [
        quantize(
            [solved(weight, keep, target)],
            hessian,
            [GRIDS["int4"]],
            dtype=torch.float32,
            sweeps=sweeps,
        )[0]
        for sweeps in (0, 3)
    ]
    assert errors[1].relative_error < errors[0].relative_error


def test_rows_without_a_kept_weight_and_dead_inputs_stay_zero():
    weight, keep, target, hessian = problem()
    keep[3] = False
    hessian[5], hessian[:, 5] = 0.0, 0.0
    keep[:, 5] = False
    (result,) = quantize(
        [solved(weight, keep, target)], hessian, [GRIDS["int4"]], dtype=torch.bfloat16
    )
    assert not result.weight[3].any()
    assert not result.weight[:, 5].any()
    assert bool(result.scale.bool().all())


def test_groups_that_do_not_divide_the_inputs_are_refused():
    weight, keep, target, hessian = problem(d=40)
    with pytest.raises(
        RacError, match="w: 40 inputs are no multiple of the group_size 16; set a group_size"
    ):
        quantize([solved(weight, keep, target)], hessian, [GRIDS["int4"]], dtype=torch.float32)


def test_a_dtype_that_cannot_hold_the_result_is_an_error():
    weight, keep, target, hessian = problem()
    with pytest.raises(RacError, match=r"w: the quantized weight overflows torch\.float16"):
        quantize(
            [solved(weight * 1e6, keep, target * 1e6)], hessian, [GRIDS["fp8"]], dtype=torch.float16
        )


def test_without_sweeps_the_values_are_codes_already():
    """GPTQ alone rounds; descent would round what it leaves."""
    weight, keep, _, hessian = problem(rows=24)
    (result,) = quantize(
        [solved(weight, keep, weight)], hessian, [GRIDS["int8"]], dtype=torch.float32, sweeps=0
    )
    codes = result.weight.double() / result.scale.double()
    assert float((codes - codes.round()).abs().max()) < 1e-3
    assert len(codes.round().unique()) > 20
    assert result.relative_error < 0.1


def test_a_target_of_zeros_loses_nothing():
    weight, keep, target, hessian = problem()
    (result,) = quantize(
        [solved(weight * 0, keep, target * 0)], hessian, [GRIDS["int4"]], dtype=torch.float32
    )
    assert result.relative_error == 0.0
    assert not result.weight.any()


def test_the_dampening_is_one_percent_unless_it_is_set():
    weight, keep, target, hessian = problem(rows=24)
    args = {"hessian": hessian, "grids": [GRIDS["int4"]], "dtype": torch.float32}
    (default,) = quantize([solved(weight, keep, target)], **args)
    found = {
        frac: quantize([solved(weight, keep, target)], dampening_frac=frac, **args)[0]
        for frac in (0.005, 0.01, 0.02)
    }
    assert torch.equal(default.weight, found[0.01].weight)
    assert not torch.equal(default.weight, found[0.005].weight)
    assert not torch.equal(default.weight, found[0.02].weight)


def test_what_cannot_work_is_refused_before_anything_is_rounded():
    weight, keep, target, hessian = problem()
    args = {"grids": [GRIDS["int4"]], "dtype": torch.float32}
    with pytest.raises(
        RacError, match=r"w: weight .* and a Hessian of 44 inputs do not fit together"
    ):
        quantize([solved(weight, keep, target)], hessian[:44, :44], **args)
    with pytest.raises(RacError, match=r"w: Hessian .* it must be square"):
        quantize([solved(weight, keep, target)], hessian[:, :44], **args)
    hessian[3, 3] = float("nan")
    with pytest.raises(RacError, match="w: the Hessian holds values that are not finite"):
        quantize([solved(weight, keep, target)], hessian, **args)
