"""What a solver is given of the calibration data: second moments of the inputs that a group of modules reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rac_modifier.errors import RacError
from rac_modifier.platform import (
    add_matmul_,
    matmul,
    mirror_lower_,
    onednn_is_faster,
    padded_size,
    with_zero_rows,
)
from rac_modifier.processes import ALONE, Processes
from rac_modifier.pruning import linalg
from rac_modifier.pruning.shard_sum import Block, ShardSum

CAP = 100.0  # times the median squared norm; `cap_weights`
ROWS = 4096  # tokens whose inputs are converted to float32 at once


def block_columns(columns: int) -> int:
    """Columns of a block row of the lower triangle."""
    return min(1024, max(64, columns // 4))


def blocks_of_triangle(columns: int) -> list[Block]:
    """The lower block triangle of [columns, columns], as (first row, last row + 1, number of columns)."""
    block = block_columns(columns)
    ends = [min(start + block, columns) for start in range(0, columns, block)]
    return list(zip(range(0, columns, block), ends, ends, strict=True))


def numbers_of_shard(columns: int) -> int:
    """How many numbers the sum of a shard has, of the `columns`^2 of a Hessian."""
    return sum((last - first) * width for first, last, width in blocks_of_triangle(columns))


class Hessian:
    """Accumulates H = 2 / sum(w) * X^T diag(w) X over calibration tokens, for inputs X [tokens, columns] and weights w.

    X^T X is symmetric, so only its lower block triangle is computed, one block row at a time, each a quarter of the columns.
    This saves 3/8 of the work. (Measured on a CPU for 256, 768, 1536 and 8960 columns: smaller blocks need fewer
    operations, but their matrix products are slower.) bfloat16 and float16 inputs are converted to float32 first, so many tokens
    at a time. The sum is not scaled until it is read. Its order is that of the shards (shard_sum.py), which `end_shard` ends.

    Attributes:
        tokens: number of rows with a weight above zero.
        weight_sum: sum of the weights; equals `tokens` when no weights were given.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        processes: Processes = ALONE,
    ):
        self.columns = columns
        self.tokens = 0
        self.weight_sum = 0.0
        self._blocks = blocks_of_triangle(columns)
        self._sums = ShardSum(columns, columns, device, dtype, self._blocks, processes)
        self._processes = processes
        self._shard = (
            0,
            0.0,
        )  # tokens and weight of the present shard, and of those that have ended
        self._shards: list[tuple[int, float]] = []

    @torch.no_grad()
    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add a batch of inputs `x` [..., columns] with one weight >= 0 per token, `weights` [...].

        Rows with weight 0 (padding) are removed before the product, so they may hold any value, even nan.

        Raises:
            RacError: shapes that do not fit, or a weight that is negative or not finite.
        """
        if x.shape[-1] != self.columns:
            raise RacError(
                f"activations {list(x.shape)} do not end in the {self.columns} inputs of this module"
            )
        x = x.reshape(-1, self.columns).to(self.device)
        counted = None
        if weights is None:
            tokens, weight = x.shape[0], float(x.shape[0])
        else:
            weights = weights.reshape(-1).to(self.device, self._sums.dtype)
            if weights.shape[0] != x.shape[0]:
                raise RacError(
                    f"{weights.shape[0]} token weights for {x.shape[0]} tokens; give one weight per token"
                )
            if not bool(((weights >= 0) & weights.isfinite()).all()):
                raise RacError(
                    f"token weights must be finite and >= 0; the smallest is {float(weights.min())}"
                )
            counted = weights > 0
            tokens, weight = int(counted.sum()), float(weights.sum(dtype=torch.float64))
        self.tokens, self.weight_sum = self.tokens + tokens, self.weight_sum + weight
        self._shard = (self._shard[0] + tokens, self._shard[1] + weight)
        copied = onednn_is_faster(self.device)  # it multiplies what lies input by input
        at_once = ROWS // 2 if copied else ROWS
        for start in range(0, x.shape[0], at_once):
            rows = slice(start, start + at_once)
            here = (
                x[rows] if counted is None or bool(counted[rows].all()) else x[rows][counted[rows]]
            )
            laid = self._input_by_input(here) if copied else here.T.to(self._sums.dtype)
            if weights is not None and counted is not None:
                of_rows = weights[rows][counted[rows]]
                if not bool(
                    (of_rows == 1).all()
                ):  # the usual case is a padding mask, which needs no scaled copy
                    scale = torch.nn.functional.pad(
                        of_rows.sqrt(), (0, laid.shape[1] - len(of_rows))
                    )
                    laid = laid * scale
            for (first, last, columns), part in zip(self._blocks, self._sums.shard, strict=True):
                add_matmul_(part, laid[first:last], laid[:columns].T)

    def _input_by_input(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, columns] transposed in a copy, with zeros up to one of a few numbers of tokens."""
        laid = torch.empty(
            self.columns, padded_size(len(x)), dtype=self._sums.dtype, device=self.device
        )
        laid[:, : len(x)] = x.T
        laid[:, len(x) :] = 0.0
        return laid

    def end_shard(self) -> None:
        """A shard of the calibration set has ended, in all processes."""
        self._sums.end_shard()
        self._shards.append(self._shard)
        self._shard = (0, 0.0)

    def finish(self) -> None:
        """After the last shard: the sum over all processes, with the same bits in each and with any number of them."""
        self._sums.finish()
        by_rank = self._processes.from_all(self._shards or [self._shard])
        self.tokens, self.weight_sum = 0, 0.0
        for shards in zip(*by_rank, strict=True):
            for tokens, weight in shards:
                self.tokens, self.weight_sum = self.tokens + tokens, self.weight_sum + weight

    @property
    def device(self) -> torch.device:
        """Where it is accumulated."""
        return self._sums.device

    def matrix(self, name: str = "this module", *, take: bool = False) -> torch.Tensor:
        """The full symmetric Hessian [columns, columns], scaled by 2 / sum(weights); a new tensor.

        With `take` it is the memory of the sum itself, which is gone from here, so that there is never a second matrix.

        Raises:
            RacError: naming the module, when no token was counted or an activation was not finite.
        """
        if self.weight_sum == 0.0:
            raise RacError(
                f"{name}: no calibration token reached it; use more traces, or add it to ignore (an unused expert)"
            )
        finite = (
            self._sums.total.diagonal().isfinite()
        )  # an inf or nan in an input makes its own square inf or nan
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise RacError(
                f"{name}: activations of {bad} of {self.columns} inputs are not finite; "
                "run the model in bfloat16 or float32, or find the layer that overflows"
            )
        full = (self._sums.take() if take else self._sums.total.clone()).mul_(2.0 / self.weight_sum)
        return mirror_lower_(full, block_columns(self.columns))


def cap_weights(
    weights: torch.Tensor, x: torch.Tensor, cap: float = CAP
) -> tuple[torch.Tensor, int]:
    """Cap the weights [...] of tokens whose input `x` [..., columns] is far larger than usual.

    The first token of a sequence can have an input whose squared norm is 10^5 times the median
    (massive activations, arXiv 2402.17762). It then owns the Hessian, and every other token counts
    for nothing. w_t becomes w_t min(1, cap median(||x||^2) / ||x_t||^2), with the median over the
    tokens of the batch whose weight is above zero.

    Returns:
        The weights, and how many of them are lower than before.
    """
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square()
    if norms.numel() != weights.numel():
        return weights, 0  # `Hessian.add` refuses them
    norms = norms.reshape(weights.shape)
    weights = weights.to(norms.device)
    counted = norms[weights > 0]
    limit = cap * counted.median() if counted.numel() else norms.new_zeros(())
    over = (weights > 0) & (norms > limit) & norms.isfinite() & (limit > 0)
    return torch.where(over, weights * (limit / norms), weights), int(over.sum())


class Statistics:
    """Second moments for modules that read the same input: `hessian`, and the cross moment if their `weights` are given.

    With the inputs X_d in the dense model and X_p in the pruned model, both [tokens, d], token weights w and the weights W
    [rows, d] of a module, its cross moment is

        C = 2 / sum(w) * W (X_d - X_p)^T diag(w) X_p        [rows, d]:

    how the error that the output has before this module is pruned correlates with the inputs (dense_target.py uses it).
    The sum is kept as [d, d], to be multiplied by W at the end, or as [rows, d], whichever costs less. Its products
    are bfloat16 where that is fast, which changes C by less than a hundredth of what other tokens would change. Those of the
    Hessian are float32: it must stay positive definite, which rounded inputs would not ensure. (Inputs that are bfloat16 already
    have exact products, and CUDA sums those in float32, so bfloat16 products would do there; that is not done.)

    With `weights`, token weights are capped (`cap_weights`), in the Hessian too: `capped` counts such tokens. Without them (the
    paper's way) every token counts as its weight says.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device | str,
        weights: Sequence[torch.Tensor] | None = None,
        processes: Processes = ALONE,
    ):
        self.hessian = Hessian(columns, device, processes=processes)
        self.capped = 0
        self._processes = processes
        self._weights = weights
        self._rows = [w.shape[0] for w in weights or ()]
        self._before = (
            sum(self._rows) >= columns / 2
        )  # before W: 2 d d operations per token; after W: 4 rows d
        self._bf16 = linalg.bf16_is_fast(torch.device(device))
        rows = columns if self._before else sum(self._rows)
        self._sums = (
            None if weights is None else ShardSum(rows, columns, device, processes=processes)
        )

    @torch.no_grad()
    def add(
        self, x: torch.Tensor, token_weights: torch.Tensor, dense: torch.Tensor | None = None
    ) -> None:
        """Add a batch: inputs `x` [..., d] of the pruned model, `dense` [..., d] of the dense model, one weight per token.

        Raises:
            RacError: see `Hessian.add`.
        """
        if self._weights is not None:
            token_weights, capped = cap_weights(token_weights, x)
            self.capped += capped
        self.hessian.add(x, token_weights)
        if self._sums is None or self._weights is None:
            return
        assert dense is not None, "the cross moment needs the inputs in the dense model"
        w = token_weights.reshape(-1).to(self._sums.device, self._sums.dtype)
        x, dense = (t.reshape(-1, t.shape[-1]) for t in (x, dense))
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            self._add_cross(
                *(t[rows].to(self._sums.device, self._sums.dtype) for t in (x, dense, w))
            )

    def _add_cross(self, x: torch.Tensor, dense: torch.Tensor, w: torch.Tensor) -> None:
        assert self._sums is not None
        assert self._weights is not None
        if not bool((w == 1).all()):
            counted = w > 0
            x, dense, w = x[counted], dense[counted], w[counted]
        difference = (dense - x).mul_(w.unsqueeze(1))
        if self._bf16:
            difference = difference.bfloat16()
            if difference.device.type == "cpu":  # oneDNN's products
                difference, x = with_zero_rows(difference), with_zero_rows(x.bfloat16())
        if not self._before:
            difference = torch.cat(
                [difference @ weight.to(difference).T for weight in self._weights], dim=1
            )
        linalg.bf16_addmm(self._sums.shard[0], difference.T, x, bf16=self._bf16)

    def end_shards(self, count: int) -> None:
        """So many shards of the calibration set have ended (one, or none yet), in all processes."""
        for _ in range(count):
            self.hessian.end_shard()
            if self._sums is not None:
                self._sums.end_shard()

    def finish(self) -> None:
        """After the last shard: the sums over all processes, with the same bits in each and with any number of them."""
        self.hessian.finish()
        self.capped = sum(self._processes.from_all(self.capped))
        if self._sums is not None:
            self._sums.finish()

    def cross_moment(self, *, take: bool = False) -> list[torch.Tensor] | None:
        """C of each module, [rows, d] float32; None when no weights were given. `take` as for `Hessian.matrix`."""
        if self._sums is None or self._weights is None:
            return None
        scaled = (self._sums.take() if take else self._sums.total.clone()).mul_(
            2.0 / self.hessian.weight_sum
        )
        if self._before:
            return [matmul(weight.to(scaled), scaled) for weight in self._weights]
        return list(scaled.split(self._rows))
