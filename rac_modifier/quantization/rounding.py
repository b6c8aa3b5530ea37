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
"""

from __future__ import annotations

import torch

from rac_modifier.pruning.linalg import Dampening, Factor
from rac_modifier.quantization.grid import Grid, Steps

_BLOCK = 128
_SUB_BLOCK = 32


def gptq(weight: torch.Tensor, keep: torch.Tensor, steps: Steps, grid: Grid, factor: Factor) -> None:
    """Round `weight` [d, rows] in place; `keep` [d, rows] in its dtype: 1.0 = kept, 0.0 = pruned; `steps` of every weight."""
    d = weight.shape[0]
    order = torch.arange(d, device=weight.device) if factor.order is None else factor.order
    at = order.tolist()
    change = torch.empty_like(weight)  # D = W - Q of the inputs that are done, in reversed order like the factor
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        these, here, before = order[start:stop], slice(d - stop, d - start), slice(d - start, d)
        _, r = factor.block(start, stop)
        passed_on = (factor.reversed_lower[before, here].T @ change[before]).flip(0)
        given = weight[these]
        block = torch.addmm(given, r.T, passed_on)
        errors = torch.empty_like(block)
        for first in range(0, stop - start, _SUB_BLOCK):
            last = min(first + _SUB_BLOCK, stop - start)
            for j in range(first, last):
                rounded = grid.round_(block[j].clone(), *steps.of(at[start + j])).mul_(keep[at[start + j]])
                error = torch.sub(block[j], rounded, out=errors[j]).div_(r[j, j])
                block[j] = rounded
                block[j + 1 : last].addr_(r[j, j + 1 : last], error, alpha=-1)
            block[last:].addmm_(r[first:last, last:].T, errors[first:last], alpha=-1)
        change[here] = (given - block).flip(0)
        weight[these] = block


def descend(
    weight: torch.Tensor,
    target: torch.Tensor,
    keep: torch.Tensor,
    steps: Steps,
    grid: Grid,
    hessian: torch.Tensor,
    dampening: Dampening,
    sweeps: int,
) -> None:
    """Coordinate descent from `weight` [d, rows] (on the grid, zero where `keep` is) towards `target`, in place."""
    d = weight.shape[0]
    inverse = dampening.diagonal.double().reciprocal().tolist()  # on a GPU, a number per input would be waited for
    for _ in range(sweeps):
        for start in range(0, d, _BLOCK):
            stop = min(start + _BLOCK, d)
            gradient = hessian[start:stop] @ (weight - target)
            gradient.addcmul_(dampening.added[start:stop].unsqueeze(1), weight[start:stop] - target[start:stop])
            local = hessian[start:stop, start:stop]
            moves = torch.empty_like(gradient)
            for first in range(0, stop - start, _SUB_BLOCK):
                last = min(first + _SUB_BLOCK, stop - start)
                for j in range(first, last):
                    best = torch.sub(weight[start + j], gradient[j], alpha=inverse[start + j])
                    best = grid.round_(best, *steps.of(start + j)).mul_(keep[start + j])
                    torch.sub(best, weight[start + j], out=moves[j])
                    weight[start + j] = best
                    gradient[j + 1 : last].addr_(local[j, j + 1 : last], moves[j])
                gradient[last:].addmm_(local[first:last, last:].T, moves[first:last])
