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
from rac_modifier.formats.encoding import NVFP4, Encoding
from rac_modifier.pruning.linalg import Dampening, Factor
from rac_modifier.quantization import solve
from rac_modifier.quantization.solve import quantize_many
from rac_modifier.settings.pattern import Pattern
from tests.pruning.pruning_reference import assert_near, dampened, quadratic_tolerance
from tests.pruning.solving import solve as prune
from tests.quantization.quantization_reference import (
    GRIDS,
    error_of,
    nearest,
    problem,
    quantize,
    solved,
)

INT4, FLOAT32 = GRIDS["int4"], torch.float32


def their_args(grid: Encoding):
    """compressed-tensors' scheme of the same grid."""
    preset = {4: "W4A16", 8: "W8A8"}[grid.bits] if grid.kind == "int" else "FP8_DYNAMIC"
    args = preset_name_to_scheme(preset, ["Linear"]).weights
    return args.model_copy(update={"group_size": grid.group_size}) if grid.group_size else args


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upstream_saves_exactly_the_codes_that_were_chosen(name, dtype):
    """llm-compressor stores quantize(weight, scale), which must not round anew (test_grid.py)."""
    grid = GRIDS[name]
    weight, keep, target, hessian = problem(rows=64)
    (result,) = quantize([solved(weight, keep, target)], hessian, [grid], dtype=dtype)
    args = (result.scale, torch.zeros_like(result.scale), their_args(grid))
    stored = torch.int8 if grid.kind == "int" else torch.float8_e4m3fn
    codes = their_quantize(result.weight.float(), *args, dtype=stored).double()
    spread = result.scale.double().repeat_interleave(grid.group_size or 48, dim=1)
    assert torch.equal(codes, grid.codes_(result.weight.double() / spread))
    assert torch.equal((codes * spread).to(dtype), result.weight)
    assert not codes[~keep].any()
    assert codes[keep].any()


@pytest.mark.parametrize(
    ("grid", "expected"), [(INT4, [3, 1, 1]), (GRIDS["fp8"], [3]), (NVFP4, [5])]
)
def test_integers_get_two_refits_and_floats_of_4_bits_two_more_sweeps(grid, expected, monkeypatch):
    calls, modules = [], problem()
    monkeypatch.setattr(solve.Rounding, "descend", lambda *args: calls.append(args[-1]))
    quantize([solved(*modules[:3])], modules[3], [grid], dtype=FLOAT32)
    assert calls == expected


@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "in the order of rounding alone"])
@pytest.mark.parametrize(
    "grid", [*GRIDS.values(), Encoding("int", 4, 16, symmetric=False)], ids=str
)
def test_a_batch_of_problems_gets_the_bits_that_each_gets_alone(grid, pruned, monkeypatch):
    """Each has two modules of an odd number of rows, on two grids; weights do not matter."""
    grids, problems, calls, inner = [grid, Encoding("int", 8, 16)], [], [], solve.Rounding

    def counted(weight, *args):
        calls.append(weight.shape)
        return inner(weight, *args)

    monkeypatch.setattr(solve, "Rounding", counted)
    for seed in range(2):
        tensors = problem(rows=50, d=176, seed=seed, sparsity=0.5 * pruned)
        hessian, factor = tensors[3], None
        if pruned:
            factor = Factor.of(hessian, Dampening.of(hessian, 0.01 * (1 + seed)), "w")
        modules = zip("ab", *(t.split([37, 13]) for t in tensors[:3]), strict=True)
        solutions = [replace(solved(w, k, t, name), factor=factor) for name, w, k, t in modules]
        problems.append((solutions, hessian, grids))
    batch = quantize_many(*zip(*problems, strict=True), dtype=torch.bfloat16)
    assert calls == [(2, 176, 37), (2, 176, 13)]
    for arguments, results in zip(problems, batch, strict=True):
        alone = quantize(*arguments, dtype=torch.bfloat16)
        for a, b in zip(alone, results, strict=True):
            assert torch.equal(a.weight, b.weight)
            assert torch.equal(a.scale, b.scale)
            assert (a.zero_point is None) == (b.zero_point is None)
            assert a.zero_point is None or torch.equal(a.zero_point, b.zero_point)
            assert a.relative_error == b.relative_error


def test_problems_of_other_shapes_or_grids_are_rounded_one_after_the_other():
    problems = []
    for rows, of_second in ((8, INT4), (12, INT4), (8, None)):
        weight, keep, target, hessian = problem(rows=rows, seed=rows)
        solutions = [solved(weight, keep, target, name) for name in "ab"]
        problems.append((solutions, hessian, [INT4, of_second]))
    results = quantize_many(*zip(*problems, strict=True), dtype=FLOAT32)
    lengths = [[r and len(r.weight) for r in pair] for pair in results]
    assert lengths == [[8, 8], [12, 12], [8, None]]
    for one, pair in zip(problems, results, strict=True):
        alone = quantize(*one, dtype=FLOAT32)
        assert torch.equal(alone[0].weight, pair[0].weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 16), (torch.bfloat16, None), (torch.float16, 16)]
)
def test_zero_points_survive_upstreams_packing_bit_for_bit(bits, dtype, size):
    """What was measured is what compressed-tensors decompresses from its int32 words."""
    weight, keep, target, hessian = problem(rows=40, sparsity=0.0)
    keep[:, 5] = False  # a dead input, whose weights are zero: codes of the zero point
    grid = Encoding("int", bits, size, symmetric=False)
    solution = solved(weight + 0.3, keep, target + 0.3)
    (result,) = quantize([solution], hessian, [grid], dtype=dtype)
    assert result.zero_point.dtype == torch.int8
    assert result.zero_point.shape == result.scale.shape == (40, 48 // (size or 48))
    assert len(result.zero_point.unique()) > 1
    assert not result.weight[:, 5].any()
    strategy = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=bits, symmetric=False, **strategy)
    scheme = QuantizationScheme(targets=["Linear"], format="pack-quantized", weights=weights)
    state = {"weight_scale": result.scale, "weight_zero_point": result.zero_point}
    state["weight"] = result.weight.float()
    stored = PackedQuantizationCompressor.compress(state, scheme)
    assert stored["weight_zero_point"].dtype == torch.int32
    again = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
    assert again.dtype == dtype
    assert torch.equal(again, result.weight)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(GRIDS)), st.integers(0, 100), st.sampled_from([0.0, 0.5, 0.8]))
def test_pruned_weights_stay_zero_and_the_error_beats_rounding_to_nearest(name, seed, sparsity):
    weight, keep, _, hessian = problem(seed=seed, sparsity=sparsity)
    target = weight  # so that rounding is all that is lost
    solution = solved(weight, keep, target)
    (result,) = quantize([solution], hessian, [GRIDS[name]], dtype=FLOAT32)
    assert not result.weight[~keep].any()
    assert not (result.weight.signbit() & (result.weight == 0)).any()
    error = error_of(result.weight, target, hessian)
    assert error < error_of(nearest(weight, name), target, hessian)
    whole = error_of(torch.zeros_like(target), target, hessian)
    tolerance = quadratic_tolerance(target - result.weight, hessian) / whole
    assert result.relative_error == pytest.approx(error / whole, abs=tolerance, rel=1e-5)
    assert tolerance < 1e-2 * error / whole


def test_modules_that_share_a_hessian_get_what_they_would_get_alone():
    """Each on its grid, and without a grid nothing."""
    tensors = problem(rows=32, dtype=torch.float64)
    hessian, modules = tensors[3], zip(*(t.split([8, 16, 4, 4]) for t in tensors[:3]), strict=True)
    solutions, grids = [solved(*module) for module in modules], [INT4, INT4, None, GRIDS["int8"]]
    results = quantize(solutions, hessian, grids, dtype=torch.bfloat16)
    assert results[2] is None
    assert [r.scale.shape for r in results if r] == [(8, 3), (16, 3), (4, 1)]
    for solution, grid, result in zip(solutions, grids, results, strict=True):
        if result is not None:
            (alone,) = quantize([solution], hessian, [grid], dtype=torch.bfloat16)
            assert torch.equal(alone.weight, result.weight)
            assert torch.equal(alone.scale, result.scale)
            assert alone.relative_error == pytest.approx(result.relative_error, rel=1e-9)


def test_the_factor_of_the_pruning_is_used_again_with_its_dampening():
    """Without one the dampening is a hundredth, unless it is set."""
    weight, _, _, hessian = problem(rows=8, dtype=torch.float64)
    (pruned,) = prune("sparsegpt", [weight], hessian, Pattern.n_of_m(2, 4), dampening_frac=0.3)

    def rounded(frac=None, **options):
        factor = None
        if frac is not None:
            factor = Factor.of(hessian, Dampening.of(hessian, frac), "w")
        solution = replace(pruned, factor=factor)
        return quantize([solution], hessian, [GRIDS["int8"]], dtype=FLOAT32, **options)[0].weight

    args = (hessian, [GRIDS["int8"]])
    (ours,) = quantize([pruned], *args, dtype=FLOAT32, dampening_frac=0.01)
    assert torch.equal(ours.weight, rounded(0.3))
    assert not torch.equal(ours.weight, rounded(0.01))
    assert torch.equal(rounded(), rounded(dampening_frac=0.01))
    assert not torch.equal(rounded(), rounded(dampening_frac=0.02))
    assert not torch.equal(rounded(), rounded(dampening_frac=0.005))


def gptq_alone(monkeypatch):
    for name in ("_SWEEPS", "_REFITS"):
        monkeypatch.setattr(solve, name, 0)


@pytest.mark.parametrize("cross", [False, True])
def test_dense_weights_are_rounded_in_the_order_of_falling_second_moments(cross, monkeypatch):
    """With the dense target the factor comes from `solve`, else it is made here."""
    weight, _, _, hessian = problem(rows=8, dtype=torch.float64)
    damped, moment = dampened(hessian, 0.01), 0.01 * weight @ hessian
    moments = [moment] if cross else None
    (solution,) = prune("none", [weight], hessian, Pattern.nothing(), cross_moment=moments)
    gptq_alone(monkeypatch)
    (result,) = quantize([solution], hessian, [INT4], dtype=FLOAT32)
    target = weight + (moment @ torch.linalg.inv(damped) if cross else 0.0)
    order = sorted(range(48), key=lambda j: -float(hessian[j, j]))
    scale = result.scale.repeat_interleave(16, dim=1).double()
    r = torch.linalg.cholesky(torch.linalg.inv(damped)[order][:, order], upper=True)
    left = target[:, order].clone()
    for j, column in enumerate(order):
        point = (left[:, j] / scale[:, column]).round().clamp(-8, 7) * scale[:, column]
        left[:, j:] -= ((left[:, j] - point) / r[j, j]).unsqueeze(1) * r[j, j:]
        left[:, j] = point
    assert_near(result.weight[:, order].double(), left, 1e-6)


def test_rows_without_a_kept_weight_dead_inputs_and_targets_of_zeros_stay_zero():
    weight, keep, target, hessian = problem()
    keep[3] = False
    hessian[5], hessian[:, 5] = 0.0, 0.0
    keep[:, 5] = False
    (result,) = quantize([solved(weight, keep, target)], hessian, [INT4], dtype=torch.bfloat16)
    assert not result.weight[3].any()
    assert not result.weight[:, 5].any()
    assert bool(result.scale.bool().all())
    (result,) = quantize([solved(0 * weight, keep, 0 * target)], hessian, [INT4], dtype=FLOAT32)
    assert result.relative_error == 0.0
    assert not result.weight.any()


def test_what_cannot_work_is_refused():
    weight, keep, target, hessian = problem()
    large = solved(weight * 1e6, keep, target * 1e6)
    with pytest.raises(RacError, match=r"w: the quantized weight in torch\.float16 is not finite"):
        quantize([large], hessian, [GRIDS["fp8"]], dtype=torch.float16)
