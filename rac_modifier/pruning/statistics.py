"""What a solver is given about the inputs of the modules that read the same tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rac_modifier.pruning import narrow
from rac_modifier.pruning.hessian import Hessian


class GroupStatistics:
    """The Hessian of the pruned model's inputs and, where the dense model's are given too, how far the outputs have drifted.

    With X_d and X_p [tokens, d] the inputs in the dense and in the pruned model, W [rows, d] and token weights w, the drift is
    2 / sum(w) * W (X_d - X_p)^T diag(w) X_p, [rows, d] for each module: the correlation of what the pruned model's inputs
    already do wrong to the output with the inputs themselves (`dense_target.py` turns it into new target weights). It is
    summed as [d, d], before W, or as [rows, d], after it, whichever costs less. Its products are bfloat16 where the device is
    fast at that (narrow.py), which changes it by less than a hundredth of what other tokens would; the Hessian's are float32,
    since it has to stay positive definite.
    """

    def __init__(self, weights: Sequence[torch.Tensor], columns: int, device: torch.device, drift: bool):
        self.hessian = Hessian(columns, device)
        self._weights = list(weights) if drift else []
        self._rows = sum(w.shape[0] for w in self._weights)
        self._before = self._rows >= columns / 2  # 2 T d d operations against 4 T rows d
        self._dtype = narrow.product_dtype(device)
        shape = (columns if self._before else self._rows, columns)
        self._sum = torch.zeros(shape, device=device) if drift else None

    @torch.no_grad()
    def add(self, x: torch.Tensor, weights: torch.Tensor, dense: torch.Tensor | None = None) -> None:
        """Count a batch: inputs `x` [rows, length, d] of the pruned model, `dense` of the dense one, weights [rows, length].

        Raises:
            RacError: see `Hessian.add`.
        """
        self.hessian.add(x, weights)
        if self._sum is None:
            return
        assert dense is not None
        weights = weights.reshape(-1).to(self._sum)
        x, dense = (t.reshape(-1, t.shape[-1]).to(self._sum) for t in (x, dense))
        if not bool((weights == 1).all()):
            counted = weights > 0
            x, dense, weights = x[counted], dense[counted], weights[counted]
        difference = (dense - x).mul_(weights.unsqueeze(1)).to(self._dtype or x.dtype)
        if not self._before:
            difference = torch.cat([difference @ w.to(difference).T for w in self._weights], dim=1)
        narrow.add_product(self._sum, difference.T, x, self._dtype)

    def drift(self) -> list[torch.Tensor] | None:
        """One [rows, d] tensor a module, float32; None when the dense inputs were not given."""
        if self._sum is None:
            return None
        scaled = self._sum * (2.0 / self.hessian.weight_sum)
        if self._before:
            return [w.to(scaled) @ scaled for w in self._weights]
        return list(scaled.split([w.shape[0] for w in self._weights]))
