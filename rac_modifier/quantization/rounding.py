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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rac_modifier.formats.encoding import Encoding, Steps
from rac_modifier.pruning.linalg import Factor

_BLOCK = 128
_SUB_BLOCK = 32


@dataclass(frozen=True)
class Rounding:
    """Weights [problems, d, rows] (transposed) on the way to a grid; rounding them is in place.

    `keep` is 1.0 where a weight is kept, else 0.0; `target` is T; `hessians` [d, d] are undamped,
    and `factors` those of the damped ones, one per problem.
    """

    weight: Tensor
    keep: Tensor
    target: Tensor
    grid: Encoding
    hessians: Sequence[Tensor]
    factors: Sequence[Factor]

    def gptq(self, steps: Steps) -> None:
        """Round with `steps`, one per weight, in the order of the factors."""
        weight, keep, factors = self.weight, self.keep, self.factors
        orders = [factor.order for factor in factors if factor.order is not None]
        if orders:  # U is of H with its inputs in this order
            zero = None if steps.zero is None else _sorted(steps.zero, orders)
            ordered = replace(
                self,
                weight=_sorted(weight, orders),
                keep=_sorted(keep, orders),
                factors=[replace(factor, order=None) for factor in factors],
            )
            ordered.gptq(Steps(_sorted(steps.scale, orders), zero))
            for original, order, result in zip(weight, orders, ordered.weight, strict=True):
                original[order] = result
            return
        d = weight.shape[1]
        change = torch.empty_like(weight)  # D^T, D = W - Q, of the inputs before, reversed as U is
        for start in range(0, d, _BLOCK):
            stop = min(start + _BLOCK, d)
            reversed_block, before = slice(d - stop, d - start), slice(d - start, d)
            lowers = [factor.reversed_lower for factor in factors]
            r = torch.stack([Factor.diagonal_blocks(lower, start, stop)[1] for lower in lowers])
            # W_B^T <- W_B^T + R_BB^T (D_before U_before,B)^T, as in sparsegpt.py
            block = torch.empty_like(weight[:, start:stop])
            for number, lower in enumerate(lowers):
                passed_on = (lower[before, reversed_block].T @ change[number, before]).flip(0)
                torch.addmm(weight[number, start:stop], r[number].T, passed_on, out=block[number])
            self._round_block(block, start, r, steps)
            change[:, reversed_block] = (weight[:, start:stop] - block).flip(1)
            weight[:, start:stop] = block

    def _round_block(self, block: Tensor, start: int, r: Tensor, steps: Steps) -> None:
        """Round the inputs of a block from `start` on, with its R [problems, inputs, inputs]."""
        errors, count = torch.empty_like(block), block.shape[1]
        keep = self.keep[:, start : start + count]
        rows, mask, errors_of = (x.unbind(1) for x in (block, keep, errors))
        diagonal = r.diagonal(dim1=1, dim2=2).split(1, dim=1)  # R_jj
        for first in range(0, count, _SUB_BLOCK):
            last = min(first + _SUB_BLOCK, count)
            for j in range(first, last):
                # q_j on the grid, 0 where pruned; e_j = (w_j - q_j) / R_jj; w_k <- w_k - e_j R_jk
                rounded = self.grid.round_(rows[j].clone(), *steps.of(start + j)).mul_(mask[j])
                error = torch.sub(rows[j], rounded, out=errors_of[j]).div_(diagonal[j])
                rows[j].copy_(rounded)
                _add_outer(block[:, j + 1 : last], r[:, j, j + 1 : last], error, -1)
            # the same for the inputs after the sub-block, of all its errors at once
            for number, of_problem in enumerate(r):
                later = of_problem[first:last, last:].T
                block[number, last:].addmm_(later, errors[number, first:last], alpha=-1)

    def descend(self, steps: Steps, sweeps: int) -> None:
        """Descend on the grid towards the target by passes of coordinate descent."""
        weight, target, hessians = self.weight, self.target, self.hessians
        d, dampenings = weight.shape[1], [factor.dampening for factor in self.factors]
        added = torch.stack([dampening.added for dampening in dampenings])
        diagonal = torch.stack([dampening.diagonal for dampening in dampenings])
        inverse = diagonal.double().reciprocal().to(weight).unsqueeze(2)  # 1 / H'_jj
        error = weight - target  # (Q - T)^T, renewed block by block
        for _ in range(sweeps):
            for start in range(0, d, _BLOCK):
                block = slice(start, min(start + _BLOCK, d))
                # G_B = (H' (Q - T)^T)_B: half the gradient of the error
                gradient = torch.empty_like(weight[:, block])
                for number, hessian in enumerate(hessians):
                    torch.mm(hessian[block], error[number], out=gradient[number])
                # H has no dampening: the share of lambda
                gradient.addcmul_(added[:, block, None], error[:, block])
                local = torch.stack([hessian[block, block] for hessian in hessians])
                self._descend_block(start, gradient, local, inverse[:, block], steps)
                error[:, block] = weight[:, block] - target[:, block]

    def _descend_block(
        self, start: int, gradient: Tensor, local: Tensor, inverse: Tensor, steps: Steps
    ) -> None:
        """Set the weights of a block's inputs one by one; `local` is H_BB of each problem."""
        block, moves = slice(start, start + gradient.shape[1]), torch.empty_like(gradient)
        inputs = (self.weight[:, block], self.keep[:, block], inverse, gradient, moves)
        rows, mask, step, slope, moves_of = (x.unbind(1) for x in inputs)
        for first in range(0, len(rows), _SUB_BLOCK):
            last = min(first + _SUB_BLOCK, len(rows))
            for j in range(first, last):
                # q_j <- the grid point nearest to q_j - G_j / H'_jj; G_k <- G_k + H_kj (its move)
                best = torch.addcmul(rows[j], slope[j], step[j], value=-1)
                best = self.grid.round_(best, *steps.of(start + j)).mul_(mask[j])
                move = torch.sub(best, rows[j], out=moves_of[j])
                rows[j].copy_(best)
                _add_outer(gradient[:, j + 1 : last], local[:, j, j + 1 : last], move, 1)
            # the same for the inputs after the sub-block, of all its moves at once
            for number, of_problem in enumerate(local):
                later = of_problem[first:last, last:].T
                gradient[number, last:].addmm_(later, moves[number, first:last])


def _sorted(x: Tensor, orders: Sequence[Tensor]) -> Tensor:
    """Sort the inputs of each problem of `x` [problems, d, rows] by its order; a new tensor."""
    return torch.stack([problem[order] for problem, order in zip(x, orders, strict=True)])


def _add_outer(out: Tensor, a: Tensor, b: Tensor, sign: int) -> None:
    """Add `sign` `a` [problems, n] times `b` [problems, rows] to `out` [problems, n, rows]."""
    out.addcmul_(a.unsqueeze(2), b.unsqueeze(1), value=sign)
