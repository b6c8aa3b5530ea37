"""The packed experts of a layer, each run on its tokens, as one opaque torch operator."""

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rac_modifier.formats.stored_weight import StoredWeight
from rac_modifier.kernels.interface import Backend
from rac_modifier.vllm_plugin.linear import PackedWeight

_SERVED: WeakValueDictionary[str, "PackedExperts"] = WeakValueDictionary()


class PackedLinear(torch.nn.Module):
    """A packed weight with its parameters."""

    def __init__(self, backend: Backend, weight: StoredWeight, served: torch.dtype) -> None:
        super().__init__()
        self.packed = PackedWeight(self, backend, weight, served)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x [T, K]: [T, N]."""
        return self.packed.linear(self, x, None)


class PackedExperts(torch.nn.Module):
    """Experts, each with the weights [2 width, hidden] (gate and up, stacked) and [hidden, width].

    The operator finds them by their layer's `name`. `local`, int [experts], has numbers on this
    rank or -1; None: the same.
    """

    def __init__(
        self,
        name: str,
        up: Iterable[PackedLinear],
        down: Iterable[PackedLinear],
        gate: Callable[[Tensor], Tensor],
        local: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.local = gate, local
        self.up, self.down = torch.nn.ModuleList(up), torch.nn.ModuleList(down)
        self.name, number = name, 1
        while self.name in _SERVED:  # another model in this process has a layer of this name
            number += 1
            self.name = f"{name}#{number}"
        _SERVED[self.name] = self

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Run x [T, hidden] through the experts `topk_ids` [T, k], weighted by `topk_weights`."""
        return torch.ops.rac_modifier.sparse_experts(x, topk_weights, topk_ids, self.name)

    def _forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        # Sort the pairs of a token and an expert by expert.
        k = topk_ids.shape[1]
        ids = (topk_ids if self.local is None else self.local[topk_ids.long()]).flatten()
        order = ids.argsort(stable=True)
        numbers, counts = ids[order].unique_consecutive(return_counts=True)
        tokens = list(zip(numbers.tolist(), counts.tolist(), strict=True))
        # Run each expert on its tokens.
        gate_up = _matmuls(x[order // k], tokens, self.up)
        gate, up = gate_up.float().chunk(2, dim=1)
        results = _matmuls((self.gate(gate) * up).to(x.dtype), tokens, self.down)
        # Sum by token, in float32 and in the token's order.
        by_token = torch.empty_like(results)
        by_token[order] = results
        out = torch.zeros(x.shape, dtype=torch.float32)
        for place, shares in enumerate(topk_weights.float().unbind(1)):
            out += by_token[place::k] * shares[:, None]
        return out.to(x.dtype)


def _matmuls(x: Tensor, tokens: list[tuple[int, int]], linears: Any) -> Tensor:
    """Multiply the next `count` rows of x by expert `number`, pair by pair; zeros for -1."""
    out = x.new_zeros(len(x), linears[0].packed.rows)
    first = 0
    for number, count in tokens:
        last = first + count
        if number >= 0:
            out[first:last] = linears[number](x[first:last])
        first = last
    return out


def _run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, name: str) -> Tensor:
    return _SERVED[name]._forward(x, topk_weights, topk_ids)


_OPERATOR = "rac_modifier::sparse_experts"
if not hasattr(torch.ops.rac_modifier, "sparse_experts"):  # once per process
    arguments = "Tensor x, Tensor topk_weights, Tensor topk_ids, str name"
    torch.library.define(_OPERATOR, f"({arguments}) -> Tensor")
    torch.library.impl(_OPERATOR, "cpu", _run)
    torch.library.register_fake(_OPERATOR, lambda x, weights, ids, name: torch.empty_like(x))
