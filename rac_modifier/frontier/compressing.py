"""The operations of pruning with the preset `quality`, counted from the shapes of a model; a multiply-add is two operations.

For a group of modules that read one input of d numbers, with r outputs of all of them and T tokens (formulas: pruning/hessian.py,
pruning/solve.py, pruning/alps.py):

    second moments, float32       2 T b       b = d^2 / 2 and the blocks on the diagonal
    cross moments, bfloat16       2 T d^2 + 2 d^2 r, or 4 T d r where r < d / 2
    factors, float32              2 (d^3 / 6 + f)                of the damped Hessian and of each stage of ALPS
    products, bfloat16            2 (p + d^2 r (s + 2))          of ALPS, of the refit and its first gradient, and the target

with f and p of ALPS itself (alps.multiply_adds) and at most s steps of the refit. Attention between tokens and passes over memory
are not counted. The products are float32 on devices without fast bfloat16.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from rac_modifier.pruning import alps
from rac_modifier.pruning.hessian import block_columns
from rac_modifier.settings.pruning import ITERATIONS, REFIT_STEPS

PASSES = 2  # the dense and the pruned model, each run once
# Modules whose input is not that of the modules before them in the same parent.
_OUTPUTS = re.compile(r"(o_proj|out_proj|down_proj|c_proj|dense|fc2|w2)$")


@dataclass(frozen=True)
class Group:
    """Modules that read the same input of `columns` numbers, with `rows` outputs each; `share` of the tokens reach it."""

    columns: int
    rows: tuple[int, ...]
    share: float = 1.0

    @property
    def weights(self) -> int:
        """Of all its modules."""
        return self.columns * sum(self.rows)


@dataclass(frozen=True)
class Operations:
    """In the dtype of products where bfloat16 is fast, and in float32."""

    products: float
    float32: float

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.products + other.products, self.float32 + other.float32)

    def seconds(self, computed: float, computed32: float) -> float:
        """At so many operations per second in bfloat16 and in float32; a device without fast bfloat16 takes float32."""
        return self.products / max(computed, computed32) + self.float32 / computed32


def moments(group: Group, tokens: float) -> Operations:
    """Of the statistics of a group; `tokens` of the whole calibration set."""
    columns, rows, reach = group.columns, sum(group.rows), tokens * group.share
    block = block_columns(columns)
    starts = range(0, columns, block)
    lower = sum(
        (min(start + block, columns) - start) * min(start + block, columns) for start in starts
    )
    before = rows >= columns / 2
    cross = 2 * reach * columns**2 + 2 * columns**2 * rows if before else 4 * reach * columns * rows
    return Operations(cross, 2 * reach * lower)


def solving(columns: int, rows: int) -> Operations:
    """Of solving modules with so many rows together."""
    factors, products = alps.multiply_adds(columns, rows, ITERATIONS)
    return Operations(
        2 * (products + columns**2 * rows * (REFIT_STEPS + 2)), 2 * (columns**3 / 6 + factors)
    )


def groups_of(
    modules: Iterable[tuple[str, torch.nn.Module]], head: torch.nn.Module | None
) -> tuple[Group, ...]:
    """The linear layers of a model in groups, as far as their names show which of them read one input."""
    found: dict[tuple[str, int, bool], list[int]] = {}
    for name, module in modules:
        if isinstance(module, torch.nn.Linear) and module is not head:
            parent, _, own = name.rpartition(".")
            key = parent, module.in_features, bool(_OUTPUTS.search(own))
            found.setdefault(key, []).append(module.out_features)
    return tuple(Group(columns, tuple(rows)) for (_, columns, _), rows in found.items())
