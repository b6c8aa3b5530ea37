"""NVFP4 and MXFP4 against tables of their values, from the search to upstream's packed bytes."""

import itertools

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme

from rac_modifier.formats.encoding import MXFP4, NVFP4
from rac_modifier.quantization.scales import search_steps
from tests.quantization.quantization_reference import error_of, problem, quantize, solved

VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
SIGNED = torch.cat([-VALUES.flip(0), VALUES])
GRIDS = {"nvfp4": NVFP4, "mxfp4": MXFP4}
names = pytest.mark.parametrize("name", GRIDS)


def nearest(scaled: torch.Tensor) -> torch.Tensor:
    """The nearest value; of two as near the one with an even place in the table."""
    even = (torch.arange(8) % 2).double() * 1e-9
    places = ((scaled.double().abs().unsqueeze(-1) - VALUES).abs() + even).argmin(-1)
    return VALUES[places] * scaled.double().sign()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_are_the_nearest_values_and_halves_go_to_even_ones(dtype):
    halves = (VALUES[1:] + VALUES[:-1]) / 2
    scaled = torch.cat([halves, -halves, SIGNED, torch.randn(1000) * 4]).to(dtype)
    assert torch.equal(GRIDS["nvfp4"].codes_(scaled.clone()).double(), nearest(scaled))


def storable(name: str, global_scale: torch.Tensor | None) -> torch.Tensor:
    """Every scale that the format has."""
    if name == "mxfp4":
        return 2.0 ** torch.arange(-30, 30).double()
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    return (every / global_scale).double()


@names
def test_a_scale_is_the_best_that_can_be_stored_near_the_largest_weight(name):
    """From half of it over 6 up to it over 4, of a weight with outliers."""
    grid = GRIDS[name]
    weight = torch.randn(5, 96) * torch.rand(5, 96).pow(3).add(0.05) * 0.1
    importance = torch.rand(96) + 0.1
    transposed = weight.T.contiguous()
    global_scale = grid.global_scale(transposed)
    chosen = search_steps(transposed, grid, importance, torch.bfloat16, global_scale).scale
    scales, shares = storable(name, global_scale), set()
    for row, group in itertools.product(range(5), range(96 // grid.group_size)):
        columns = slice(group * grid.group_size, (group + 1) * grid.group_size)
        part, largest = weight[row, columns].double(), float(weight[row, columns].abs().max())

        def error(scale, part=part, columns=columns):
            return float(
                ((nearest(part / scale) * scale - part).square() * importance[columns]).sum()
            )

        scale = float(chosen[group, row])
        assert float((scales - scale).abs().min()) == 0
        near = scales[(scales >= 0.51 * largest / 6) & (scales <= largest / 3.99)].tolist()
        assert error(scale) <= min(map(error, near)) * (1 + 1e-5)
        shares.add(round(6 * scale / largest, 1))
    assert min(shares) < 0.95
    assert max(shares) > 1.3


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upstreams_bytes_hold_exactly_the_weights_that_were_chosen(name, dtype):
    """Of two modules that share inputs; one has a row of zeros, and one of tiny weights."""
    weight, keep, _, hessian = problem(rows=40, d=96, sparsity=0.0)
    weight = weight * 0.05
    weight[3], weight[4] = 0.0, weight[4] * 1e-5
    solutions = [
        solved(w, k, w, n)
        for n, w, k in zip("ab", weight.split([30, 10]), keep.split([30, 10]), strict=True)
    ]
    results = quantize(solutions, hessian, [GRIDS[name]] * 2, dtype=dtype)
    scheme = preset_name_to_scheme(f"{name}a16", ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(f"{name}-pack-quantized")
    for result in results:
        state = {"weight": result.weight.float(), "weight_scale": result.scale}
        if name == "nvfp4":
            assert torch.equal(result.global_scale, results[0].global_scale)
            state["weight_global_scale"] = result.global_scale
        stored = compressor.compress(state, scheme)
        packed = stored["weight_packed"]
        codes = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).long()
        codes = VALUES[codes & 7].float() * (1 - 2 * (codes >> 3))
        if name == "nvfp4":
            assert stored["weight_scale"].dtype == torch.float8_e4m3fn
            scale = stored["weight_scale"].float() / stored["weight_global_scale"]
        else:
            assert stored["weight_scale"].dtype == torch.uint8
            scale = 2.0 ** (stored["weight_scale"].float() - 127)
        wide = scale.repeat_interleave(GRIDS[name].group_size, dim=1)
        assert torch.equal((codes * wide).to(dtype), result.weight)
        loaded = compressor.decompress(stored, scheme)["weight"]
        assert torch.equal(loaded, (codes * wide).bfloat16())
        assert not (result.weight.signbit() & (result.weight == 0)).any()
    assert not results[0].weight[3].any()
    assert bool(results[0].scale.bool().all())


@names
def test_the_error_is_far_below_rounding_to_nearest_and_the_search_has_its_share(name, monkeypatch):
    """Upstream's scale maps the largest weight to 6, or to the power of two that is nearest."""
    weight, keep, target, hessian = problem(rows=64, d=96, sparsity=0.0)
    grid, args = GRIDS[name], ([solved(weight, keep, target)], hessian, [GRIDS[name]])
    (result,) = quantize(*args, dtype=torch.float32)
    parts = target.double().unflatten(1, (-1, grid.group_size))
    scale = parts.abs().amax(2, keepdim=True) / 6
    if name == "mxfp4":
        scale = 2.0 ** scale.log2().round()
    plain = (nearest(parts / scale) * scale).flatten(1)
    error = error_of(result.weight, target, hessian)
    assert error < 0.5 * error_of(plain, target, hessian)
    with monkeypatch.context() as patched:  # instead of fits: two more sweeps
        patched.setattr("rac_modifier.quantization.solve._REFITS", 0)
        (fewer,) = quantize(*args, dtype=torch.float32)
    assert error < 0.999 * error_of(fewer.weight, target, hessian)
    args = (args[0], torch.eye(96), args[2])  # no weight corrects another
    (searched,) = quantize(*args, dtype=torch.float32)
    monkeypatch.setattr("rac_modifier.quantization.scales._FP4_FACTORS", (1.0,))
    (largest,) = quantize(*args, dtype=torch.float32)
    assert searched.relative_error < 0.93 * largest.relative_error
