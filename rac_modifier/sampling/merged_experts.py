"""Experts that llm-compressor has cut into linear layers, read as transformers' merged tensors.

So a model has the same fingerprint before and after, and traces collected from it are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

_PARTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class MergedExperts:
    """A tensor [experts, rows, columns] in pieces: `parts` of each expert, [rows of a part, columns]."""

    parts: list[list[torch.Tensor]]

    @property
    def shape(self) -> torch.Size:
        """The shape of the merged tensor."""
        first = self.parts[0]
        return torch.Size(
            [len(self.parts), sum(part.shape[0] for part in first), first[0].shape[1]]
        )

    def numel(self) -> int:
        """Count its numbers."""
        return self.shape.numel()

    def every(self, stride: int) -> torch.Tensor:
        """Return every `stride`-th number of the flat tensor, float32 on the CPU."""
        _, rows, columns = self.shape
        numbers = []
        for flat in range(0, self.numel(), stride):
            expert, row, column = flat // (rows * columns), flat // columns % rows, flat % columns
            for part in self.parts[expert]:
                if row < part.shape[0]:
                    numbers.append(float(part.detach()[row, column]))
                    break
                row -= part.shape[0]
        return torch.tensor(numbers, dtype=torch.float32)


def with_merged_experts(
    model: torch.nn.Module, parameters: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor | MergedExperts]]:
    """Yield parameters in their order, separate experts merged into gate_up_proj and down_proj.

    Experts with other parts, biases or transposed weights stay as they are.
    """
    layers = {name: module for name, module in model.named_modules() if _is_separate(module)}
    pending: dict[str, torch.Tensor] = {}
    for name, tensor in parameters:
        layer, is_expert, _ = name.rpartition(".experts.")
        layer = f"{layer}.experts"
        if not is_expert or layer not in layers:
            yield name, tensor
            continue
        pending[name] = tensor
        count: int = layers[layer].num_experts
        if len(pending) == count * len(_PARTS):
            gate, up, down = (
                [pending[f"{layer}.{i}.{part}.weight"] for i in range(count)] for part in _PARTS
            )
            yield (
                f"{layer}.gate_up_proj",
                MergedExperts([list(pair) for pair in zip(gate, up, strict=True)]),
            )
            yield f"{layer}.down_proj", MergedExperts([[weight] for weight in down])
            pending.clear()


def _is_separate(module: torch.nn.Module) -> bool:
    usual = (
        getattr(module, "is_transposed", None) is False
        and getattr(module, "has_bias", None) is False
    )
    if not (isinstance(module, torch.nn.ModuleList) and usual):
        return False
    count = getattr(module, "num_experts", 0)
    names = {name for expert in list(module)[:count] for name, _ in expert.named_parameters()}
    return count > 0 and names == {f"{part}.weight" for part in _PARTS}
