"""Shapes of the groups of a run, as far as its memory depends on them, and what other groups keep meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rac_modifier.llmcompressor.experts import find_experts

_FLOAT32 = 4


@dataclass(frozen=True)
class GroupShape:
    """Modules that read the same input of `columns` numbers, named after the first; `rows` counts the outputs of all.

    Layer by layer, `summed` and `beside` are bytes of the other groups of the layer: of their sums while all are added up, and of
    what is left of them while this one is solved. `alike` is the number of groups of this shape that may be solved at once; 0:
    those of a layer's experts, where the model has some. `routed`: of an expert that is calibrated on its own tokens.
    """

    name: str
    columns: int
    rows: int
    summed: int = 0
    beside: int = 0
    alike: int = 0
    routed: bool = False

    @classmethod
    def of(cls, names: dict[torch.nn.Module, str], modules: Sequence[torch.nn.Module]) -> GroupShape:
        """The shape of some of the modules of `names`."""
        shapes = [tuple(module.weight.shape) for module in modules]  # type: ignore[arg-type]
        return cls(names[modules[0]], shapes[0][1], sum(rows for rows, _ in shapes))

    @classmethod
    def by_group(
        cls, model: torch.nn.Module, names: dict[torch.nn.Module, str], groups: Sequence[Sequence[torch.nn.Module]]
    ) -> list[GroupShape]:
        """Of a run that goes group by group."""
        routed = {module for experts in find_experts(model, names) for module in experts.modules}
        return [replace(cls.of(names, modules), routed=modules[0] in routed) for modules in groups]

    @classmethod
    def by_layer(cls, model: torch.nn.Module, names: dict[torch.nn.Module, str]) -> list[GroupShape]:
        """Of a run that goes layer by layer, as far as is known before: modules of one parent with as many inputs are a group.

        Gate and up of all routed experts of a layer are one group, since all of them read every token there.
        """
        left, layers = dict(names), {}  # type: dict[torch.nn.Module, str], dict[str, list[GroupShape]]
        for routed in find_experts(model, names):
            for module in routed.modules:
                left.pop(module, None)
            first = [module for expert in routed.experts for module in expert.first]
            last = [cls.of(names, expert.last) for expert in routed.experts if expert.last]
            found = [cls.of(names, first)] if first else []
            layers.setdefault(_layer(routed.name), []).extend(found + [replace(one, alike=len(last)) for one in last])
        groups: dict[tuple[str, int], list[torch.nn.Module]] = {}
        for module, name in left.items():
            columns: int = module.weight.shape[1]  # type: ignore[assignment, index]
            groups.setdefault((name.rpartition(".")[0], columns), []).append(module)
        for (name, _), modules in groups.items():
            layers.setdefault(_layer(name), []).append(cls.of(names, modules))
        return [_beside_others(one, layer) for layer in layers.values() for one in layer]


def _layer(name: str) -> str:
    """The part of a module's name up to the number of its layer."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def _beside_others(group: GroupShape, layer: Sequence[GroupShape]) -> GroupShape:
    """With what the other groups of its layer keep beside it, at the most."""
    others = _FLOAT32 * (sum(one.columns**2 for one in layer) - group.columns**2)
    return replace(group, summed=2 * others, beside=others)
