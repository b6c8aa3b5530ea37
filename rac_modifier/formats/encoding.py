"""The values of a quantized weight: (code - zero point) times scale, per row or group of columns.

A symmetric grid has no zero points: they are 0. Weights are transposed here, [d, rows], as in the
solvers; scales and zero points are [groups, rows]. All may have a leading dimension: problems.

A code is an integer, or a float of 8 bits (e4m3) or 4 (e2m1: 0, .5, 1, 1.5, 2, 3, 4, 6). Codes of
e2m1 in groups of 16 are NVFP4: a scale is a value of e4m3 over one `global_scale`, float32, of all
modules that read the same input (a server multiplies these together). In groups of 32 they are
MXFP4 (OCP Microscaling Formats 1.0): a scale is a power of two.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

# By bits of a float: the largest value, bits of the mantissa, the least exponent.
_FLOATS = {8: (448.0, 3, -6), 4: (6.0, 1, 0)}
_E4M3, _EXPONENT_BITS = torch.float8_e4m3fn, 0x7F800000
_LARGEST_CODE = 4.0  # of the group with the largest weight, whose scale is the largest of e4m3


@dataclass(frozen=True)
class Encoding:
    """How a weight is written: codes, integers of `bits` bits or floats, times scales.

    `group_size` columns share a scale; None: a row does. Without `symmetric` (integers only) they
    share a zero point too: the code that means zero. `scale_type`: a float of the model's dtype, a
    value of e4m3 over a `global_scale`, or a power of two (e8m0). Floats of 16 and 32 bits have no
    scale; "bfloat" tells bfloat16 from float16.
    """

    kind: Literal["int", "float", "bfloat"]
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_type: Literal["float", "e4m3", "e8m0"] = "float"

    @classmethod
    def of(cls, dtype: torch.dtype, bits: int, group_size: int | None, symmetric: bool) -> Self:
        """Return how stored values of `dtype` are written; `bits`: of the codes of int8."""
        if dtype == torch.int8:
            return cls("int", bits, group_size, symmetric)
        kind: Literal["float", "bfloat"] = "bfloat" if dtype == torch.bfloat16 else "float"
        return cls(kind, 8 * dtype.itemsize, group_size)

    @property
    def is_scaled(self) -> bool:
        """Return whether a scale belongs to the codes."""
        return self.bits <= 8

    @property
    def half_range(self) -> float:
        """Return the largest weight over its scale, as in compressed-tensors: (max - min) / 2."""
        return _FLOATS[self.bits][0] if self.kind == "float" else ((1 << self.bits) - 1) / 2

    @property
    def lowest(self) -> int:
        """Return the lowest code of integers."""
        return -(1 << (self.bits - 1))

    @property
    def is_lopsided(self) -> bool:
        """Return whether the extra negative code is worth a search for the sign (below 8 bits)."""
        return self.kind == "int" and self.symmetric and self.bits < 8

    @property
    def has_coarse_scales(self) -> bool:
        """Return whether a scale has few values, so that it is searched and never trained."""
        return self.scale_type != "float"

    @property
    def can_be_sparse(self) -> bool:
        """Return whether a checkpoint stores these codes with a mask, and leaves zeros out."""
        codes = (self.kind, self.bits) in (("int", 4), ("int", 8), ("float", 8))
        return codes and self.symmetric and not self.has_coarse_scales

    def groups(self, columns: int) -> int:
        """Return the number of scales of a row of `columns` weights."""
        return -(-columns // self.group_size) if self.group_size else 1

    def column_scales(self, scales: Tensor, columns: int) -> Tensor:
        """Repeat the scales [groups, rows] for every weight, [columns, rows]."""
        return scales.repeat_interleave(self.group_size or columns, dim=-2)[..., :columns, :]

    def round_(self, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Round `weight` in place to the nearest (code - `zero`) `scale`; both broadcast."""
        return self.codes_(weight.div_(scale), zero).mul_(scale)

    def codes_(self, scaled: Tensor, zero: Tensor | None = None) -> Tensor:
        """Round weights divided by scales, in place, to code - `zero`, half to even."""
        if zero is not None:
            return self.codes_(scaled.add_(zero)).sub_(zero)
        if self.kind == "float":
            gaps = self.gaps(scaled.clamp_(-self.half_range, self.half_range))
            return scaled.div_(gaps).round_().mul_(gaps)
        return scaled.clamp_(self.lowest, -self.lowest - 1).round_()

    def gaps(self, scaled: Tensor) -> Tensor:
        """Return the distance between the two codes around each value; at a code, away from 0."""
        if self.kind == "int":
            return torch.ones_like(scaled)
        _, mantissa, least = _FLOATS[self.bits]
        return _power_of_two(scaled).clamp_(min=2.0**least).mul_(2.0**-mantissa).to(scaled)

    def gap_towards_zero(self, codes: Tensor) -> Tensor:
        """Return the distance from each code to the next one towards 0."""
        return self.gaps(torch.nextafter(codes, torch.zeros_like(codes)))

    def global_scale(self, weight: Tensor) -> Tensor | None:
        """Return what the scales of a weight [d, rows] are multiplied by: float32 [1], or None."""
        if self.scale_type != "e4m3":
            return None
        largest = weight.abs().amax(dim=(-2, -1)).unsqueeze(-1)
        largest = torch.where(largest == 0, 1.0, largest)
        return (torch.finfo(_E4M3).max * _LARGEST_CODE / largest).float()

    def stored(
        self, scales: Tensor, dtype: torch.dtype, global_scale: Tensor | None = None
    ) -> Tensor:
        """Round scales to those that a module of `dtype` stores, away from 0; the sign stays."""
        tiny = torch.finfo(dtype).tiny
        if global_scale is not None:
            # float16 tells codes apart down to a 64th of its least normal number
            local = local_scale(scales.clamp(min=tiny / 64), global_scale)
            return used_scale(local, global_scale).to(scales)
        if self.scale_type == "e8m0":
            return _power_of_two(scales * 2**0.5).clamp_(min=tiny).to(scales)
        sizes = scales.abs().to(dtype).clamp(min=tiny).to(scales.dtype)
        return torch.where(scales < 0, -sizes, sizes)


@dataclass(frozen=True)
class Steps:
    """Scales and zero points (None: symmetric): [groups, rows], or [columns, rows] if spread."""

    scale: Tensor
    zero: Tensor | None = None

    def spread(self, grid: Encoding, columns: int) -> "Steps":
        """Repeat them for every weight."""
        zero = None if self.zero is None else grid.column_scales(self.zero, columns)
        return Steps(grid.column_scales(self.scale, columns), zero)

    def of(self, column: int) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point, [rows], of one column."""
        zero = None if self.zero is None else self.zero.select(-2, column)
        return self.scale.select(-2, column), zero


NVFP4 = Encoding("float", 4, 16, scale_type="e4m3")
MXFP4 = Encoding("float", 4, 32, scale_type="e8m0")


def local_scale(scales: Tensor, global_scale: Tensor) -> Tensor:
    """Return what is stored of scales next to `global_scale`: values of e4m3, float32."""
    local, limits = scales.float() * global_scale, torch.finfo(_E4M3)
    return local.clamp(limits.tiny * limits.eps, limits.max).to(_E4M3).float()


def used_scale(local: Tensor, global_scale: Tensor | None) -> Tensor:
    """Return what codes are multiplied by, as compressed-tensors computes it."""
    return local if global_scale is None else local.float() / global_scale


def _power_of_two(values: Tensor) -> Tensor:
    """Return the powers of two at or below the sizes of values, float32."""
    return (values.float().view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
