"""Operators that a GPU would be asked for to solve one expert: counted, not measured. `expert_time.py --launches` prints them."""

from __future__ import annotations

from typing import Any

import torch
from scale_estimate import H100
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rac_modifier.frontier.estimate import REACHED
from rac_modifier.pruning import linalg, sparsegpt
from rac_modifier.pruning.solve import Problem, solve_many
from rac_modifier.quantization.grid import Grid
from rac_modifier.quantization.solve import PrunedProblem, quantize_many
from rac_modifier.settings.pattern import Pattern

HIDDEN, WIDTH = 2048, 1024  # of OLMoE-1B-7B and of its experts
LAUNCH = 5e-6  # seconds per operator on a GPU, assumed


def problem(columns: int, rows: int, seed: int, cross: bool) -> Problem:
    """A random one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    moment = [0.01 * weight] if cross else None
    return Problem([weight], x.T @ x / columns, [Pattern.n_of_m(2, 4)], [str(seed)], moment)


class Launches(TorchDispatchMode):
    """Counts operators that a GPU would be asked for, and the least time each would take there: bytes and products over rates."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waits, self.seconds, self.with_launches = 0, 0, 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(
            ("empty", "new_empty", "_reshape_alias", "detach", "_unsafe_view", "unbind", "split")
        ):
            return result
        if name == "_local_scalar_dense":
            self.waits += 1
            return result
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        moved = sum(
            t.numel() * t.element_size()
            for t in [*given, *tree_leaves(result)]
            if isinstance(t, Tensor)
        )
        took = moved / (REACHED * H100.copied)
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"):
            a, b = [t for t in args if isinstance(t, Tensor)][-2:]
            rate = H100.computed if a.dtype == torch.bfloat16 else H100.computed32
            took += 2 * a.numel() * b.shape[-1] / (REACHED * rate)
        self.count += 1
        self.seconds += took
        self.with_launches += max(took, LAUNCH)
        return result


def launches_table() -> None:
    """Per expert: gate and up are solved, and down. Rounding also of as many experts as are rounded at once on a GPU."""
    linalg.bf16_is_fast = lambda device: True  # as on the GPU
    print(
        f"| solver | operators | waits | launches at {LAUNCH * 1e6:.0f} us | work, counted | the longer of both, each |"
    )
    print("|---" * 6 + "|")
    several = sparsegpt.at_once(HIDDEN, 2 * WIDTH, torch.device("cuda"))
    for label, solver, experts in (
        ("alps", "alps", 1),
        ("sparsegpt", "sparsegpt", 1),
        ("rounding to int4 alone", "none", 1),
        (f"rounding to int4 alone, {several} experts at once", "none", several),
    ):
        counted = Launches()
        for shape in ((HIDDEN, 2 * WIDTH), (WIDTH, HIDDEN)):
            count_solve(counted, solver, shape, experts)
        times = (counted.count * LAUNCH, counted.seconds, counted.with_launches)
        cells = " | ".join(f"{seconds / experts * 1000:.1f} ms" for seconds in times)
        print(
            f"| {label} | {counted.count / experts:,.0f} | {counted.waits / experts:,.1f} | {cells} |",
            flush=True,
        )


def count_solve(counted: Launches, solver: Any, shape: tuple[int, int], experts: int) -> None:
    """Count the solve of some experts' modules of one shape, and their rounding where nothing is pruned."""
    given = [problem(*shape, seed, cross=solver == "alps") for seed in range(experts)]
    with counted:
        found = solve_many(solver, given)
        if solver == "none":
            grids = [Grid("int", 4, 128)]
            solved = [PrunedProblem(s, g.hessian, grids) for s, g in zip(found, given, strict=True)]
            quantize_many(solved, dtype=torch.bfloat16)
