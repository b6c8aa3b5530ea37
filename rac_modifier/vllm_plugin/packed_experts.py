"""Packed experts as one opaque torch operator, `torch.ops.rac_modifier.sparse_experts`: each runs on the tokens routed to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from rac_modifier.checkpoint.stored_weight import StoredWeight
from rac_modifier.kernels.interface import Backend
from rac_modifier.vllm_plugin.packed_weight import PackedWeight

_SERVED: WeakValueDictionary[str, PackedExperts] = WeakValueDictionary()


class PackedExperts(torch.nn.Module):
    """Experts with the weights [2 width, hidden] (gate and up projections, stacked) and [hidden, width] (down projection).

    Their packed weights are parameters of this module, where memory accounting finds them.
    """

    def __init__(
        self,
        name: str,
        experts: Sequence[tuple[tuple[Backend, StoredWeight], tuple[Backend, StoredWeight]]],
        gate: Callable[[Tensor], Tensor],
        served: torch.dtype,
        local: Tensor | None = None,
    ) -> None:
        """Packs each weight for its backend.

        Args:
            name: of the layer; the operator finds its experts by it.
            experts: in the order of their numbers.
            gate: the activation of the gate projection.
            served: dtype of the activations.
            local: the number here of each expert that a token may be routed to, int [experts], -1 for those of other ranks; None:
                the same number.
        """
        super().__init__()
        self.gate, self.local = gate, local
        self.holders = torch.nn.ModuleList(torch.nn.Module() for _ in range(2 * len(experts)))
        packed = [
            PackedWeight(holder, backend, weight, served)
            for holder, (backend, weight) in zip(
                self.holders, (part for pair in experts for part in pair), strict=True
            )
        ]
        pairs = list(zip(packed, self.holders, strict=True))
        self.up, self.down = pairs[::2], pairs[1::2]
        self.name = _free_name(name)
        _SERVED[self.name] = self

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """x [T, hidden] through the experts `topk_ids` [T, k] of each token, weighted by `topk_weights` [T, k]: [T, hidden].

        Each expert gets its tokens at once. Sums are float32, in the order in which a token names its experts.
        """
        return torch.ops.rac_modifier.sparse_experts(x, topk_weights, topk_ids, self.name)

    def _forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        ids = (topk_ids if self.local is None else self.local[topk_ids.long()]).flatten()
        order = ids.argsort(stable=True)  # the pairs of a token and an expert, by expert
        numbers, counts = (
            found.tolist() for found in torch.unique_consecutive(ids[order], return_counts=True)
        )
        pairs = x[order // topk_ids.shape[1]]
        both = _products(pairs, numbers, counts, self.up)
        gate, up = both.float().chunk(2, dim=1)
        results = _products((self.gate(gate) * up).to(x.dtype), numbers, counts, self.down)
        of_tokens = torch.empty_like(results)
        of_tokens[order] = results
        out = torch.zeros(x.shape, dtype=torch.float32)
        for place, shares in enumerate(topk_weights.float().unbind(1)):
            out += of_tokens[place :: topk_ids.shape[1]] * shares[:, None]
        return out.to(x.dtype)


def _products(
    x: Tensor,
    numbers: list[int],
    counts: list[int],
    packed: Sequence[tuple[PackedWeight, torch.nn.Module]],
) -> Tensor:
    """Each expert's product with its rows of `x`, which follow each other; zeros for number -1, experts of other ranks."""
    out = x.new_zeros(len(x), packed[0][0].rows)
    first = 0
    for number, count in zip(numbers, counts, strict=True):
        last = first + count
        if number >= 0:
            weight, holder = packed[number]
            out[first:last] = weight.linear(holder, x[first:last], None)
        first = last
    return out


def _free_name(name: str) -> str:
    """`name`, with a number where another model in this process has a layer of this name."""
    found, number = name, 1
    while found in _SERVED:
        number += 1
        found = f"{name}#{number}"
    return found


def _run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, name: str) -> Tensor:
    return _SERVED[name]._forward(x, topk_weights, topk_ids)


def _fake(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


if not hasattr(
    torch.ops.rac_modifier, "sparse_experts"
):  # once per process, also if this module is loaded again
    torch.library.define(
        "rac_modifier::sparse_experts",
        "(Tensor x, Tensor topk_weights, Tensor topk_ids, str name) -> Tensor",
    )
    torch.library.impl("rac_modifier::sparse_experts", "cpu", _run)
    torch.library.register_fake("rac_modifier::sparse_experts", _fake)
