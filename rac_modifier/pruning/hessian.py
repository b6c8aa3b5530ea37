"""Second moments of the inputs that a group of modules reads: what a solver needs of the data."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rac_modifier.distributed.processes import ALONE, Processes
from rac_modifier.errors import RacError
from rac_modifier.pruning import linalg
from rac_modifier.pruning.cholesky import mirror_lower_
from rac_modifier.pruning.shard_sum import Block, ShardSum
from rac_modifier.runtime.cpu_tuning import (
    add_matmul_,
    matmul,
    onednn_is_faster,
    padded_size,
    with_zero_rows,
)

CAP = 100.0  # times the median squared norm; `_cap_weights`
ROWS = 4096  # tokens per float32 copy of the inputs


class Hessian:
    """Accumulates H = 2 / sum(w) * X^T diag(w) X for inputs X [tokens, columns] and weights w.

    Only the lower block triangle of X^T X is computed, one block row of a quarter of the columns at
    a time: 5/8 of the work (smaller blocks have slower matmuls). Inputs are converted to float32,
    `ROWS` tokens at a time. Shards (shard_sum.py) order the sum. `tokens` counts the rows with a
    weight above zero.
    """

    def __init__(
        self, columns: int, device: torch.device | str = "cpu", processes: Processes = ALONE
    ):
        self.columns, self.tokens, self.weight_sum = columns, 0, 0.0
        self.device = torch.device(device)
        self._blocks = self.blocks(columns)
        self._sums = ShardSum(columns, columns, device, self._blocks, processes)
        self._processes = processes
        self._shard = (0, 0.0)  # tokens and weight of the present shard
        self._shards: list[tuple[int, float]] = []

    @staticmethod
    def blocks(columns: int) -> list[Block]:
        """Return the blocks of the lower triangle of [columns, columns] (shard_sum.py)."""
        block = min(1024, max(64, columns // 4))
        ends = [min(start + block, columns) for start in range(0, columns, block)]
        return list(zip(range(0, columns, block), ends, ends, strict=True))

    @staticmethod
    def numbers_of_shard(columns: int) -> int:
        """Return how many numbers a shard holds of the `columns`^2 of a Hessian."""
        return sum((last - first) * width for first, last, width in Hessian.blocks(columns))

    @torch.no_grad()
    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add inputs `x` [..., columns], with a weight >= 0 per token, `weights` [...].

        Rows with weight 0 (padding) are removed first, so they may hold any value, even nan.
        """
        count = x.shape[:-1].numel()
        if x.shape[-1] != self.columns or (weights is not None and weights.numel() != count):
            given = "one each" if weights is None else f"{weights.numel()} token weights"
            raise RacError(
                f"activations {list(x.shape)} and {given}: a Hessian of {self.columns} inputs "
                f"takes [..., {self.columns}] and a weight per token"
            )
        x = x.reshape(-1, self.columns).to(self.device)
        weights = x.new_ones(len(x)) if weights is None else weights
        weights = weights.reshape(-1).to(self.device, torch.float32)
        counted = weights > 0
        tokens, weight = int(counted.sum()), float(weights.sum(dtype=torch.float64))
        self.tokens, self.weight_sum = self.tokens + tokens, self.weight_sum + weight
        self._shard = (self._shard[0] + tokens, self._shard[1] + weight)
        step = ROWS // 2 if onednn_is_faster(self.device) else ROWS
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            inputs, scale = x[rows], weights[rows]
            if not bool(counted[rows].all()):
                inputs, scale = inputs[counted[rows]], scale[counted[rows]]
            self._add(inputs, scale)

    def _add(self, x: Tensor, weights: Tensor) -> None:
        """Add a few tokens, all with a weight above zero."""
        if onednn_is_faster(self.device):  # it multiplies what is contiguous input by input
            inputs = torch.zeros(self.columns, padded_size(len(x)), device=self.device)
            inputs[:, : len(x)] = x.T
        else:
            inputs = x.T.to(torch.float32)
        # X^T diag(w) X = Y^T Y with Y = diag(sqrt w) X
        if not bool((weights == 1).all()):
            missing = inputs.shape[1] - len(weights)
            inputs = inputs * torch.nn.functional.pad(weights.sqrt(), (0, missing))
        # S[first:last, :columns] += X[:, first:last]^T X[:, :columns]
        for (first, last, columns), total in zip(self._blocks, self._sums.shard, strict=True):
            add_matmul_(total, inputs[first:last], inputs[:columns].T)

    def end_shard(self) -> None:
        """End a shard of the calibration set, on all ranks."""
        self._sums.end_shard()
        self._shards.append(self._shard)
        self._shard = (0, 0.0)

    def finish(self) -> None:
        """Sum over all ranks after the last shard; the bits do not depend on their number."""
        self._sums.finish()
        by_rank = self._processes.from_all(self._shards or [self._shard])
        self.tokens, self.weight_sum = 0, 0.0
        for shards in zip(*by_rank, strict=True):
            for tokens, weight in shards:
                self.tokens, self.weight_sum = self.tokens + tokens, self.weight_sum + weight

    def take(self, name: str = "this module") -> Tensor:
        """Return the symmetric Hessian [columns, columns], and drop the sum (RacError: no sum)."""
        if self.weight_sum == 0.0:
            raise RacError(
                f"{name}: no calibration token reached it; use more traces, or add it to ignore "
                "(an unused expert)"
            )
        # an inf or nan makes the square on the diagonal one
        if bad := int((~self._sums.total.diagonal().isfinite()).sum()):
            raise RacError(
                f"{name}: activations of {bad} of {self.columns} inputs are not finite; run the "
                "model in bfloat16 or float32, or find the layer that overflows"
            )
        # 2 / sum(w) X^T diag(w) X, of which the sum has the lower triangle
        scaled = self._sums.take().mul_(2.0 / self.weight_sum)
        return mirror_lower_(scaled, self._blocks[0][1])


def _cap_weights(weights: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """Cap the weights [...] of tokens whose input `x` [..., columns] is far larger than usual.

    The first token of a sequence can have an input whose squared norm is 10^5 times the median
    (massive activations, arXiv 2402.17762), and would own the Hessian. w_t becomes w_t min(1, `CAP`
    median(||x||^2) / ||x_t||^2), with the median over the tokens of the batch that count.

    Returns:
        The weights, and how many of them are lower than before.
    """
    norms = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square()
    if norms.numel() != weights.numel():
        return weights, 0  # `Hessian.add` refuses them
    norms = norms.reshape(weights.shape)
    weights = weights.to(norms.device)
    counted = norms[weights > 0]
    # w_t min(1, limit / ||x_t||^2); a norm that is not finite stays for `Hessian.take` to refuse
    limit = CAP * counted.median() if counted.numel() else norms.new_zeros(())
    over = (weights > 0) & (norms > limit) & norms.isfinite() & (limit > 0)
    return torch.where(over, weights * (limit / norms), weights), int(over.sum())


class Statistics:
    """Second moments for modules that read the same input: their Hessian, and with `weights` more.

    With the `weights` W [rows, d] of the modules, the inputs X_d in the dense and X_p in the pruned
    model, both [tokens, d], and token weights w, each module has a cross moment: how the output
    error before this module is pruned correlates with the inputs,

        C = 2 / sum(w) * W (X_d - X_p)^T diag(w) X_p        [rows, d].

    It is summed as [d, d] and multiplied by W at the end, or as [rows, d], whichever costs less, by
    bfloat16 matmuls where these are fast: they change C by less than a hundredth of what other
    tokens would. The Hessian takes float32, to stay positive definite.

    Token weights are then capped (`_cap_weights`), in the Hessian too; `capped` counts the tokens.
    """

    def __init__(
        self,
        columns: int,
        device: torch.device | str,
        weights: Sequence[Tensor] | None = None,
        processes: Processes = ALONE,
    ):
        self.hessian = Hessian(columns, device, processes)
        self.capped = 0
        self._processes, self._weights = processes, weights
        self._rows = [w.shape[0] for w in weights or ()]
        # before W: 2 d d operations per token; after W: 4 rows d
        self._before = sum(self._rows) >= columns / 2
        self._bf16 = linalg.bf16_is_fast(torch.device(device))
        self._sums: ShardSum | None = None
        if weights is not None:
            rows = columns if self._before else sum(self._rows)
            self._sums = ShardSum(rows, columns, device, processes=processes)

    @torch.no_grad()
    def add(self, x: Tensor, token_weights: Tensor, dense: Tensor | None = None) -> None:
        """Add inputs `x` of the pruned and `dense` of the dense model, [..., d], weighted [...]."""
        if self._weights is not None:
            token_weights, capped = _cap_weights(token_weights, x)
            self.capped += capped
        self.hessian.add(x, token_weights)
        if self._sums is None:
            return
        assert dense is not None, "the cross moment needs the inputs in the dense model"
        tensors = (t.reshape(-1, self.hessian.columns) for t in (x, dense))
        split = (t.split(ROWS) for t in (*tensors, token_weights.reshape(-1)))
        for batch in zip(*split, strict=True):
            self._add_cross(self._sums, *(t.to(self.hessian.device, torch.float32) for t in batch))

    def _add_cross(self, sums: ShardSum, x: Tensor, dense: Tensor, w: Tensor) -> None:
        if not bool((w == 1).all()):
            counted = w > 0
            x, dense, w = x[counted], dense[counted], w[counted]
        difference = (dense - x).mul_(w.unsqueeze(1))  # diag(w) (X_d - X_p)
        if self._bf16:
            difference, x = difference.bfloat16(), x.bfloat16()
            if x.device.type == "cpu":  # oneDNN multiplies them
                difference, x = with_zero_rows(difference), with_zero_rows(x)
        if not self._before:
            # one row per output: diag(w) (X_d - X_p) W^T
            images = [difference @ w.to(difference).T for w in self._weights or ()]
            difference = torch.cat(images, dim=1)
        if self._bf16:
            sums.shard[0].add_(difference.T @ x)
        else:
            sums.shard[0].addmm_(difference.T, x)

    def end_shards(self, count: int) -> None:
        """End `count` shards of the calibration set, on all ranks."""
        for _ in range(count):
            self.hessian.end_shard()
            if self._sums is not None:
                self._sums.end_shard()

    def finish(self) -> None:
        """Sum over all ranks after the last shard; the bits do not depend on their number."""
        self.hessian.finish()
        self.capped = sum(self._processes.from_all(self.capped))
        if self._sums is not None:
            self._sums.finish()

    def take_cross_moment(self) -> list[Tensor] | None:
        """Return C of each module, [rows, d] float32, and drop the sum; None without weights."""
        if self._sums is None:
            return None
        # 2 / sum(w) times (X_d - X_p)^T diag(w) X_p [d, d], or W times that [rows, d]
        scaled = self._sums.take().mul_(2.0 / self.hessian.weight_sum)
        if self._before:
            return [matmul(weight.to(scaled), scaled) for weight in self._weights or ()]
        return list(scaled.split(self._rows))
