"""Problems of pruned weights on a grid, and the slow ways to round them, in float64."""

import torch

from rac_modifier.formats.encoding import Encoding
from rac_modifier.pruning.solve import Solution
from rac_modifier.quantization.solve import quantize_many

GRIDS = {"int4": Encoding("int", 4, 16), "int8": Encoding("int", 8), "fp8": Encoding("float", 8)}
HALF_RANGE = {"int4": 7.5, "int8": 127.5, "fp8": 448.0}  # (max - min) / 2 of the codes


def problem(rows=12, d=48, seed=0, sparsity=0.5, dtype=torch.float32):
    """Pruned weights with their mask, target and Hessian, of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, d, generator=generator) @ torch.randn(d, d, generator=generator)
    target = torch.randn(rows, d, generator=generator).to(dtype)
    keep = torch.rand(rows, d, generator=generator) >= sparsity
    x = x.to(dtype)
    return target * keep, keep, target, 2 * x.T @ x / len(x)


def solved(
    weight: torch.Tensor, keep: torch.Tensor, target: torch.Tensor, name: str = "w"
) -> Solution:
    return Solution(name, weight, keep, target, 0.0, 0.0, 0.0, 0, 0, 0, None)


def nearest_code(scaled: torch.Tensor, name: str) -> torch.Tensor:
    """The nearest code, after clamping."""
    if name == "fp8":
        return scaled.clamp(-448, 448).to(torch.float8_e4m3fn).to(scaled)
    bits = {"int4": 4, "int8": 8}[name]
    return scaled.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round()


def nearest(weight: torch.Tensor, name: str) -> torch.Tensor:
    """Each weight of `weight` [rows, d] to the nearest point of the grid that compressed-tensors
    has for it."""
    result = torch.zeros_like(weight)
    size = GRIDS[name].group_size or weight.shape[1]
    for start in range(0, weight.shape[1], size):
        part = weight[:, start : start + size]
        scale = (part.abs().amax(1, keepdim=True) / HALF_RANGE[name]).clamp(min=1e-9)
        result[:, start : start + size] = nearest_code(part / scale, name) * scale
    return result


def error_of(weight: torch.Tensor, target: torch.Tensor, hessian: torch.Tensor) -> float:
    change = (weight - target).double()
    return float((change @ hessian.double() * change).sum())


def quantize(solutions, hessian, grids, **settings):
    """Round the modules of one problem."""
    return quantize_many([solutions], [hessian], [grids], **settings)[0]
