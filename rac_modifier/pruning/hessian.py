"""What a solver is given of the calibration data: second moments of the inputs that a group of modules reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rac_modifier.errors import RacError
from rac_modifier.processes import Processes
from rac_modifier.pruning import linalg


def block_columns(columns: int) -> int:
    """Columns of a block row of the lower triangle."""
    return min(1024, max(64, columns // 4))


class Hessian:
    """Accumulates H = 2 / sum(w) * X^T diag(w) X over calibration tokens, for inputs X [tokens, columns] and weights w.

    X^T X is symmetric, so only its lower block triangle is computed, one block row at a time, each a quarter of the columns.
    This saves 3/8 of the work. (Measured on a CPU for 256, 768, 1536 and 8960 columns: smaller blocks need fewer
    operations, but their matrix products are slower.) The sum is not scaled until it is read, so the order of the batches
    changes only float32 rounding. bfloat16 and float16 inputs are converted to float32 first.

    Attributes:
        tokens: number of rows with a weight above zero.
        weight_sum: sum of the weights; equals `tokens` when no weights were given.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.columns = columns
        self.tokens = 0
        self.weight_sum = 0.0
        self._sum = torch.zeros(columns, columns, device=device, dtype=dtype)
        self._block = block_columns(columns)

    @torch.no_grad()
    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add a batch of inputs `x` [..., columns] with one weight >= 0 per token, `weights` [...].

        Rows with weight 0 (padding) are removed before the product, so they may hold any value, even nan.

        Raises:
            RacError: shapes that do not fit, or a weight that is negative or not finite.
        """
        if x.shape[-1] != self.columns:
            raise RacError(f"activations {list(x.shape)} do not end in the {self.columns} inputs of this module")
        x = x.reshape(-1, self.columns).to(self._sum.device)
        if weights is None:
            self.tokens += x.shape[0]
            self.weight_sum += x.shape[0]
            x = x.to(self._sum.dtype)
        else:
            weights = weights.reshape(-1).to(self._sum)
            if weights.shape[0] != x.shape[0]:
                raise RacError(f"{weights.shape[0]} token weights for {x.shape[0]} tokens; give one weight per token")
            if not bool(((weights >= 0) & weights.isfinite()).all()):
                raise RacError(f"token weights must be finite and >= 0; the smallest is {float(weights.min())}")
            counted = weights > 0
            if not bool(counted.all()):
                x, weights = x[counted], weights[counted]
            self.tokens += x.shape[0]
            self.weight_sum += float(weights.sum(dtype=torch.float64))
            x = x.to(self._sum.dtype)
            if not bool((weights == 1).all()):  # the usual case is a padding mask, which needs no scaled copy
                x = x * weights.sqrt().unsqueeze(1)
        for start in range(0, self.columns, self._block):
            stop = min(start + self._block, self.columns)
            self._sum[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])

    def gather(self, processes: Processes) -> None:
        """Add up what each process has accumulated; afterwards all of them hold the same bits."""
        processes.add_up(self._sum)
        tokens, self.weight_sum = processes.sums(self.tokens, self.weight_sum)
        self.tokens = int(tokens)

    @property
    def device(self) -> torch.device:
        """Where it is accumulated."""
        return self._sum.device

    @property
    def sum_of_squares(self) -> torch.Tensor:
        """Weighted sum of squares of each input [columns]; Wanda's norm is its square root."""
        return self._sum.diagonal().clone()

    def matrix(self, name: str = "this module") -> torch.Tensor:
        """The full symmetric Hessian [columns, columns], scaled by 2 / sum(weights); a new tensor.

        Raises:
            RacError: naming the module, when no token was counted or an activation was not finite.
        """
        if self.weight_sum == 0.0:
            raise RacError(
                f"{name}: no calibration token reached it; use more traces, or add it to ignore (an unused expert)"
            )
        if not bool(self._sum.diagonal().isfinite().all()):  # an inf or nan in an input makes its own square inf or nan
            bad = int((~self._sum.diagonal().isfinite()).sum())
            raise RacError(
                f"{name}: activations of {bad} of {self.columns} inputs are not finite; "
                "run the model in bfloat16 or float32, or find the layer that overflows"
            )
        full = self._sum * (2.0 / self.weight_sum)
        for start in range(0, self.columns, self._block):
            stop = min(start + self._block, self.columns)
            corner = full[start:stop, start:stop]
            corner.copy_(corner.tril() + corner.tril(-1).T)
            full[start:stop, stop:] = full[stop:, start:stop].T
        return full


class Statistics:
    """Second moments for modules that read the same input: `hessian`, and the cross moment if their `weights` are given.

    With the inputs X_d in the dense model and X_p in the pruned model, both [tokens, d], token weights w and the weights W
    [rows, d] of a module, its cross moment is

        C = 2 / sum(w) * W (X_d - X_p)^T diag(w) X_p        [rows, d]:

    how the error that the output has before this module is pruned correlates with the inputs (dense_target.py uses it).
    The sum is kept as [d, d], to be multiplied by W at the end, or as [rows, d], whichever costs less. Its products
    are bfloat16 where that is fast, which changes C by less than a hundredth of what other tokens would change. Those of the
    Hessian are float32, because it must stay positive definite.
    """

    def __init__(self, columns: int, device: torch.device | str, weights: Sequence[torch.Tensor] | None = None):
        self.hessian = Hessian(columns, device)
        self._weights = weights
        self._rows = [w.shape[0] for w in weights or ()]
        self._before = sum(self._rows) >= columns / 2  # before W: 2 d d operations per token; after W: 4 rows d
        self._bf16 = linalg.bf16_is_fast(torch.device(device))
        shape = (columns if self._before else sum(self._rows), columns)
        self._sum = None if weights is None else torch.zeros(shape, device=device)

    @torch.no_grad()
    def add(self, x: torch.Tensor, token_weights: torch.Tensor, dense: torch.Tensor | None = None) -> None:
        """Add a batch: inputs `x` [..., d] of the pruned model, `dense` [..., d] of the dense model, one weight per token.

        Raises:
            RacError: see `Hessian.add`.
        """
        self.hessian.add(x, token_weights)
        if self._sum is None or self._weights is None:
            return
        assert dense is not None, "the cross moment needs the inputs in the dense model"
        w = token_weights.reshape(-1).to(self._sum)
        x, dense = (t.reshape(-1, t.shape[-1]).to(self._sum) for t in (x, dense))
        if not bool((w == 1).all()):
            counted = w > 0
            x, dense, w = x[counted], dense[counted], w[counted]
        difference = (dense - x).mul_(w.unsqueeze(1))
        if self._bf16:
            difference = difference.bfloat16()
        if not self._before:
            difference = torch.cat([difference @ weight.to(difference).T for weight in self._weights], dim=1)
        linalg.bf16_addmm(self._sum, difference.T, x, bf16=self._bf16)

    def gather(self, processes: Processes) -> None:
        """Add up what each process has accumulated; afterwards all of them hold the same bits."""
        self.hessian.gather(processes)
        if self._sum is not None:
            processes.add_up(self._sum)

    def cross_moment(self, of: Sequence[int] | None = None) -> list[torch.Tensor] | None:
        """C of the modules numbered `of` (None: of all), [rows, d] float32; None when no weights were given."""
        if self._sum is None or self._weights is None:
            return None
        scaled = self._sum * (2.0 / self.hessian.weight_sum)
        of = range(len(self._rows)) if of is None else of
        if self._before:
            return [self._weights[i].to(scaled) @ scaled for i in of]
        parts = scaled.split(self._rows)
        return [parts[i] for i in of]
