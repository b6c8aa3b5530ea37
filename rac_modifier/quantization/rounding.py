"""Round kept weights to a grid, and correct each rounding error with the other kept weights; pruned weights stay zero.

Two steps on the layer problem min trace((W - T) H (W - T)^T) that the pruning solved. With the mask fixed, its solution is the
weight W that the refit gave.

1. *GPTQ* (arXiv 2210.17323), input by input in the order of the factor, with H = U U^T and R = U^-1 as in sparsegpt.py: the
   error of input j, e_j = (w_j - q_j) / R_jj, changes every later input k by -e_j R_jk. Pruned weights take part: the
   corrections that a pruned weight has received are an error too, since it is set to zero again, and later inputs correct it.
   Where nothing was pruned, inputs with the largest second moments come first, while most others can still correct them
   (`actorder: static` elsewhere). The checkpoint does not depend on the order: scales belong to neighbouring inputs.
2. *Coordinate descent.* R does not depend on the mask, so the corrections that pruned weights received were not placed best.
   Each sweep sets every kept weight, with the others fixed, to the grid point nearest to the minimum of the error along it,
   q_j - ((Q - T) H)_j / H_jj. The error falls with each move, and only kept weights move.

Both take several problems of one shape: the experts of a mixture. What is done for each input, on a row of weights, is done for
all problems at once, because its calls take longer than its work; matrix products are taken problem by problem. So each problem
gets the bits that it gets alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from rac_modifier.pruning.linalg import Dampening, Factor
from rac_modifier.quantization.grid import Grid, Steps

_BLOCK = 128
_SUB_BLOCK = 32


def gptq(
    weight: torch.Tensor, keep: torch.Tensor, steps: Steps, grid: Grid, factors: Sequence[Factor]
) -> None:
    """Round `weight` [problems, d, rows] in place, with a factor for each problem.

    `keep` is in its shape and dtype: 1.0 = kept, 0.0 = pruned. `steps` are those of every weight.
    """
    orders = [factor.order for factor in factors if factor.order is not None]
    if orders:
        sorted_weight, sorted_keep = _sorted(weight, orders), _sorted(keep, orders)
        zero = None if steps.zero is None else _sorted(steps.zero, orders)
        own = [replace(factor, order=None) for factor in factors]
        gptq(sorted_weight, sorted_keep, Steps(_sorted(steps.scale, orders), zero), grid, own)
        for each, order, result in zip(weight, orders, sorted_weight, strict=True):
            each[order] = result
        return
    d = weight.shape[1]
    change = torch.empty_like(
        weight
    )  # D = W - Q of the inputs that are done, in reversed order like the factor
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        here, before = slice(d - stop, d - start), slice(d - start, d)
        r = torch.stack([factor.block(start, stop)[1] for factor in factors])
        block = torch.empty_like(weight[:, start:stop])
        for number, factor in enumerate(factors):
            passed_on = (factor.reversed_lower[before, here].T @ change[number, before]).flip(0)
            torch.addmm(weight[number, start:stop], r[number].T, passed_on, out=block[number])
        errors = torch.empty_like(block)
        rows, kept, errors_of = (x.unbind(1) for x in (block, keep[:, start:stop], errors))
        diagonal = r.diagonal(dim1=1, dim2=2).split(1, dim=1)
        for first in range(0, stop - start, _SUB_BLOCK):
            last = min(first + _SUB_BLOCK, stop - start)
            for j in range(first, last):
                rounded = grid.round_(rows[j].clone(), *steps.of(start + j)).mul_(kept[j])
                error = torch.sub(rows[j], rounded, out=errors_of[j]).div_(diagonal[j])
                rows[j].copy_(rounded)
                _add_outer(block[:, j + 1 : last], r[:, j, j + 1 : last], error, -1)
            for number in range(len(factors)):
                r_last = r[number, first:last, last:].T
                block[number, last:].addmm_(r_last, errors[number, first:last], alpha=-1)
        change[:, here] = (weight[:, start:stop] - block).flip(1)
        weight[:, start:stop] = block


def descend(
    weight: torch.Tensor,
    target: torch.Tensor,
    keep: torch.Tensor,
    steps: Steps,
    grid: Grid,
    hessians: Sequence[torch.Tensor],
    dampenings: Sequence[Dampening],
    sweeps: int,
) -> None:
    """Coordinate descent from `weight` [problems, d, rows] (on the grid, zero where `keep` is) towards `target`, in place."""
    d = weight.shape[1]
    added = torch.stack([dampening.added for dampening in dampenings])
    inverse = (
        torch.stack([dampening.diagonal for dampening in dampenings])
        .double()
        .reciprocal()
        .to(weight)
    )
    for _ in range(sweeps):
        for start in range(0, d, _BLOCK):
            stop = min(start + _BLOCK, d)
            gradient = torch.empty_like(weight[:, start:stop])
            for number, hessian in enumerate(hessians):
                torch.mm(hessian[start:stop], weight[number] - target[number], out=gradient[number])
            gradient.addcmul_(
                added[:, start:stop, None], weight[:, start:stop] - target[:, start:stop]
            )
            local = torch.stack([hessian[start:stop, start:stop] for hessian in hessians])
            moves = torch.empty_like(gradient)
            here = (x[:, start:stop] for x in (weight, keep, inverse.unsqueeze(2)))
            rows, kept, step, slope, moves_of = (x.unbind(1) for x in (*here, gradient, moves))
            for first in range(0, stop - start, _SUB_BLOCK):
                last = min(first + _SUB_BLOCK, stop - start)
                for j in range(first, last):
                    best = torch.addcmul(rows[j], slope[j], step[j], value=-1)
                    best = grid.round_(best, *steps.of(start + j)).mul_(kept[j])
                    move = torch.sub(best, rows[j], out=moves_of[j])
                    rows[j].copy_(best)
                    _add_outer(gradient[:, j + 1 : last], local[:, j, j + 1 : last], move, 1)
                for number in range(len(hessians)):
                    gradient[number, last:].addmm_(
                        local[number, first:last, last:].T, moves[number, first:last]
                    )


def _sorted(x: torch.Tensor, orders: Sequence[torch.Tensor]) -> torch.Tensor:
    """`x` [problems, d, rows] with the inputs of each problem in its order; a new tensor."""
    return torch.stack([each[order] for each, order in zip(x, orders, strict=True)])


def _add_outer(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, sign: int) -> None:
    """`out` [problems, n, rows] += `sign` `a` [problems, n] times `b` [problems, rows]."""
    out.addcmul_(a.unsqueeze(2), b.unsqueeze(1), value=sign)
