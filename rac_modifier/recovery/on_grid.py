"""Train through the codes of a quantized weight: the forward pass uses the stored weight.

With a float32 master weight w, a scale s of either sign per row or group, and codes
c = round(clamp(w / s)), the forward pass uses c s, and gradients pass straight through:

    dL/dw = dL/d(c s)                  where w / s is not clamped, else 0
    dL/ds = sum dL/d(c s) (c - w / s)  where it is not clamped, else dL/d(c s) c

(LSQ, arXiv 1902.08153). A pruned weight is 0, so its code is 0 whatever its scale is.

Scales of 4-bit floats have few values (encoding.py), so they are not trained.

Master weights start in the cell of their code, which holds all values that round to it, on the side
of the dense weight: from its middle, a code changes after many steps of training.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from rac_modifier.formats.encoding import Encoding
from rac_modifier.pruning.linalg import cached_slices

_WIDTH = 0.45  # of a step of the grid to each side: a border itself may round either way


@dataclass(frozen=True)
class QuantizedWeight:
    """How a module's weight is quantized, and what training starts from."""

    grid: Encoding
    scale: Tensor  # [rows, groups], in the dtype that is stored; float32 if it is not trained
    master: Tensor | None = None  # with the same codes and zeros; None: code times scale
    zero: Tensor | None = None  # [rows, groups], of an asymmetric grid; it is not trained


def codes_of(weight: Tensor, scale: Tensor, grid: Encoding, zero: Tensor | None = None) -> Tensor:
    """Return the codes [rows, columns], float32, of code times scale, counted from zero points.

    Exact also for weights that were rounded to bfloat16 or float16, by less than half a step.
    """
    points = None if zero is None else _spread(zero.float(), grid, weight)  # z, or 0
    return grid.codes_(weight.float() / _spread(scale.float(), grid, weight), points)  # w / s


def master_in_cell(codes: Tensor, scale: Tensor, grid: Encoding, target: Tensor) -> Tensor:
    """Return the float32 weight nearest to `target` [rows, columns] that rounds to `codes`."""
    scales = _spread(scale.float(), grid, codes)
    reach = _WIDTH * grid.gap_towards_zero(codes)  # of the cell of c, in steps
    return torch.clamp(target.float() / scales, codes - reach, codes + reach) * scales


def pruned_share(codes: Tensor, scale: Tensor, grid: Encoding, dense: Tensor) -> float:
    """Return the share of zeros whose dense weight is above 3/4 of a step: pruned, not rounded."""
    # half a step rounds to zero, and corrections of other weights move some beyond that
    least = 0.75 * _spread(scale.float().abs(), grid, codes) * grid.gap_towards_zero(codes)
    return float(((codes == 0) & (dense.float().abs() > least)).float().mean())


def _spread(part: Tensor, grid: Encoding, like: Tensor) -> Tensor:
    """Repeat [rows, groups] for every weight of `like` [rows, columns]."""
    columns = like.shape[1]
    return part.repeat_interleave(grid.group_size or columns, dim=1)[:, :columns]


class _OnGrid(torch.nn.Module):
    """Parametrize a weight [rows, columns] by a master weight and changes of its scales."""

    start: Tensor
    zero: Tensor | None
    log_change: Tensor | None

    def __init__(self, quantized: QuantizedWeight):
        super().__init__()
        self.grid, self.dtype, zero = quantized.grid, quantized.scale.dtype, quantized.zero
        self.register_buffer("start", quantized.scale.detach().float())
        self.register_buffer("zero", None if zero is None else zero.detach().float())
        coarse = self.grid.has_coarse_scales
        change = None if coarse else torch.nn.Parameter(torch.zeros_like(self.start))
        self.register_parameter("log_change", change)

    def scale(self) -> Tensor:
        """Return the scales [rows, groups] as they would be stored; gradients pass the rounding."""
        if self.log_change is None:
            return self.start
        exact = self.start * self.log_change.exp()  # the sign stays, and steps are relative
        return exact + (self.grid.stored(exact.detach(), self.dtype) - exact).detach()

    def forward(self, master: Tensor) -> Tensor:
        """Return code times scale."""
        return _CodeTimesScale.apply(master, self.scale(), self.zero, self.grid)


class _CodeTimesScale(torch.autograd.Function):
    """The backward pass rounds again, so that only the inputs are kept, which exist anyway."""

    @staticmethod
    def forward(
        ctx: Any, master: Tensor, scale: Tensor, zero: Tensor | None, grid: Encoding
    ) -> Tensor:
        ctx.save_for_backward(master, scale, zero)
        ctx.grid = grid
        value = torch.empty_like(master)
        for rows, scales, zeros in _blocks(master, scale, zero, grid):
            torch.mul(grid.codes_(master[rows] / scales, zeros), scales, out=value[rows])  # c s
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (master, scale, zero), grid = ctx.saved_tensors, ctx.grid
        for_master, for_scale = torch.empty_like(master), torch.empty_like(scale)
        lowest, highest = grid.codes_(scale.new_tensor([-torch.inf, torch.inf]))
        most = torch.finfo(master.dtype).max
        for rows, scales, zeros in _blocks(master, scale, zero, grid):
            # w / s, and c - zero; a scale near 0 must not make an inf, whose 0 multiple is nan
            scaled = (master[rows] / scales).clamp_(-most, most)
            codes = grid.codes_(scaled.clone(), zeros)
            stored = scaled if zeros is None else scaled + zeros
            inside = stored.clamp(lowest, highest).eq_(stored)  # 1.0 or 0.0: a CPU is slow at bools
            # dL/dw = dL/d(c s) inside; dL/ds = sum dL/d(c s) (c - w / s), or of c outside
            torch.mul(outer[0][rows], inside, out=for_master[rows])
            change = codes.sub_(scaled.mul_(inside)).mul_(outer[0][rows])
            for_scale[rows] = _sum_of_groups(change, grid, scale.shape[1])
        return for_master, for_scale, None, None


def _blocks(
    master: Tensor, scale: Tensor, zero: Tensor | None, grid: Encoding
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Yield rows that stay in the cache, with the scales and zero points of their weights."""
    for rows in cached_slices(master):
        zeros = None if zero is None else _spread(zero[rows], grid, master)
        yield rows, _spread(scale[rows], grid, master), zeros


def _sum_of_groups(values: Tensor, grid: Encoding, groups: int) -> Tensor:
    """Sum [rows, columns] by group: [rows, groups]; the last group may have fewer columns."""
    columns = values.shape[1]
    size = grid.group_size or columns
    whole = torch.nn.functional.pad(values, (0, groups * size - columns))
    return whole.unflatten(1, (groups, size)).sum(-1)


@contextlib.contextmanager
def on_grid(model: torch.nn.Module, quantized: Mapping[str, QuantizedWeight]) -> Iterator[None]:
    """Train the weights of these modules through their codes and scales inside this context.

    Fake quantization of compressed-tensors is off meanwhile. Afterwards `weight` holds code times
    scale, and `weight_scale`, if the module has it, the scales.
    """
    modules: dict[str, Any] = {name: model.get_submodule(name) for name in quantized}
    faked: list[Any] = [m for m in model.modules() if hasattr(m, "quantization_enabled")]
    enabled = {module: module.quantization_enabled for module in faked}
    for module in faked:
        module.quantization_enabled = False
    for name, module in modules.items():
        form = _OnGrid(quantized[name]).to(module.weight.device)
        parametrize.register_parametrization(module, "weight", form)
    try:
        yield
    finally:
        for module in modules.values():
            form = module.parametrizations.weight[0]
            scale = form.scale().detach().to(form.dtype)
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
            if hasattr(module, "weight_scale") and form.log_change is not None:
                module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        for module, value in enabled.items():
            module.quantization_enabled = value


def trained_name(name: str, quantized: Mapping[str, QuantizedWeight]) -> str:
    """Return a parameter's name in training; a quantized weight is parametrized by its master."""
    module, _, leaf = name.rpartition(".")
    if module in quantized and leaf == "weight":
        return f"{module}.parametrizations.{leaf}.original"
    return name
