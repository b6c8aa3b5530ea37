"""Round kept weights to a grid, and correct each error with other kept weights; zeros stay zero.

Two steps on the layer problem min trace((W - T) H (W - T)^T) that the pruning solved, from the
weights W of the refit:

1. *GPTQ* (arXiv 2210.17323), input by input in the order of the factor, with H = U U^T and
   R = U^-1 as in sparsegpt.py: the error of input j, e_j = (w_j - q_j) / R_jj, changes every later
   input k by -e_j R_jk. Pruned weights take part: the corrections that a pruned weight received
   are an error too, since it is set to zero again. Where nothing was pruned, inputs with the
   largest second moments come first (`actorder: static` elsewhere), while others can correct them.
2. *Coordinate descent.* R does not depend on the mask, so the corrections of pruned weights were
   not placed best. Each sweep sets every kept weight, with the others fixed, to the grid point
   nearest to the minimum of the error along it, q_j - ((Q - T) H)_j / H_jj. The error falls with
   each move.

Both take a batch of problems of one shape (routed experts) and share the calls on a row of weights;
matmuls are per problem, so each gets the bits that it gets alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rac_modifier.formats.encoding import Encoding, Steps
from rac_modifier.pruning.linalg import Dampening, Factor, diagonal_blocks

_BLOCK = 128
_SUB_BLOCK = 32


def gptq(
    weight: Tensor, keep: Tensor, steps: Steps, grid: Encoding, factors: Sequence[Factor]
) -> None:
    """Round `weight` [problems, d, rows] in place; `keep`: 1.0 = kept; `steps`: one per weight."""
    orders = [factor.order for factor in factors if factor.order is not None]
    if orders:
        ordered, zero = _sorted(weight, orders), steps.zero
        steps = Steps(_sorted(steps.scale, orders), None if zero is None else _sorted(zero, orders))
        factors = [replace(factor, order=None) for factor in factors]
        gptq(ordered, _sorted(keep, orders), steps, grid, factors)
        for original, order, result in zip(weight, orders, ordered, strict=True):
            original[order] = result
        return
    d = weight.shape[1]
    change = torch.empty_like(weight)  # D = W - Q of the inputs before, reversed like the factor
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        reversed_block, before = slice(d - stop, d - start), slice(d - start, d)
        lowers = [factor.reversed_lower for factor in factors]
        r = torch.stack([diagonal_blocks(lower, start, stop)[1] for lower in lowers])
        block = torch.empty_like(weight[:, start:stop])
        for number, lower in enumerate(lowers):
            passed_on = (lower[before, reversed_block].T @ change[number, before]).flip(0)
            torch.addmm(weight[number, start:stop], r[number].T, passed_on, out=block[number])
        errors = torch.empty_like(block)
        rows, mask, errors_of = (x.unbind(1) for x in (block, keep[:, start:stop], errors))
        diagonal = r.diagonal(dim1=1, dim2=2).split(1, dim=1)
        for first in range(0, stop - start, _SUB_BLOCK):
            last = min(first + _SUB_BLOCK, stop - start)
            for j in range(first, last):
                rounded = grid.round_(rows[j].clone(), *steps.of(start + j)).mul_(mask[j])
                error = torch.sub(rows[j], rounded, out=errors_of[j]).div_(diagonal[j])
                rows[j].copy_(rounded)
                _add_outer(block[:, j + 1 : last], r[:, j, j + 1 : last], error, -1)
            for number in range(len(factors)):
                r_last = r[number, first:last, last:].T
                block[number, last:].addmm_(r_last, errors[number, first:last], alpha=-1)
        change[:, reversed_block] = (weight[:, start:stop] - block).flip(1)
        weight[:, start:stop] = block


def descend(
    weight: Tensor,
    target: Tensor,
    keep: Tensor,
    steps: Steps,
    grid: Encoding,
    hessians: Sequence[Tensor],
    dampenings: Sequence[Dampening],
    sweeps: int,
) -> None:
    """Descend from `weight` [problems, d, rows], on the grid, towards `target`, in place."""
    d = weight.shape[1]
    added, diagonal = (
        torch.stack([getattr(dampening, name) for dampening in dampenings])
        for name in ("added", "diagonal")
    )
    inverse = diagonal.double().reciprocal().to(weight).unsqueeze(2)
    error = weight - target  # Q - T, renewed block by block
    for _ in range(sweeps):
        for start in range(0, d, _BLOCK):
            block = slice(start, min(start + _BLOCK, d))
            gradient, moves = torch.empty_like(weight[:, block]), torch.empty_like(weight[:, block])
            for number, hessian in enumerate(hessians):
                torch.mm(hessian[block], error[number], out=gradient[number])
            gradient.addcmul_(added[:, block, None], error[:, block])
            local = torch.stack([hessian[block, block] for hessian in hessians])
            inputs = (*(x[:, block] for x in (weight, keep, inverse)), gradient, moves)
            rows, mask, step, slope, moves_of = (x.unbind(1) for x in inputs)
            for first in range(0, len(rows), _SUB_BLOCK):
                last = min(first + _SUB_BLOCK, len(rows))
                for j in range(first, last):
                    best = torch.addcmul(rows[j], slope[j], step[j], value=-1)
                    best = grid.round_(best, *steps.of(start + j)).mul_(mask[j])
                    move = torch.sub(best, rows[j], out=moves_of[j])
                    rows[j].copy_(best)
                    _add_outer(gradient[:, j + 1 : last], local[:, j, j + 1 : last], move, 1)
                for number in range(len(hessians)):
                    later = local[number, first:last, last:].T
                    gradient[number, last:].addmm_(later, moves[number, first:last])
            error[:, block] = weight[:, block] - target[:, block]


def _sorted(x: Tensor, orders: Sequence[Tensor]) -> Tensor:
    """Sort the inputs of each problem of `x` [problems, d, rows] by its order; a new tensor."""
    return torch.stack([problem[order] for problem, order in zip(x, orders, strict=True)])


def _add_outer(out: Tensor, a: Tensor, b: Tensor, sign: int) -> None:
    """Add `sign` `a` [problems, n] times `b` [problems, rows] to `out` [problems, n, rows]."""
    out.addcmul_(a.unsqueeze(2), b.unsqueeze(1), value=sign)
