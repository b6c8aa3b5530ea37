"""Shapes of the groups of a run, as far as its memory depends on them, and what other groups keep meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rac_modifier.llmcompressor.experts import find_experts
from rac_modifier.pruning.hessian import numbers_of_lane

_FLOAT32 = 4


def saves_by_waiting(here: GroupShape | None, after: GroupShape | None, tokens: int) -> bool:
    """Whether the weights of a group take less than the dense model's inputs of the group after it, where these are wider.

    The dense stream waits there (dense_stream.py). Not beside routed experts, which take what they read from all batches.
    """
    if here is None or after is None or not widens(here, after, after.columns):
        return False
    return tokens * (after.columns - here.columns) > here.columns * here.rows


def widens(here: GroupShape | None, after: GroupShape | None, columns: int) -> bool:
    """Whether the group `after` reads `columns` numbers, and this one fewer. Not beside routed experts."""
    if here is None or after is None or here.routed or after.routed:
        return False
    return here.columns < after.columns == columns


@dataclass(frozen=True)
class GroupShape:
    """Modules that read the same input of `columns` numbers, named after the first; `rows` counts the outputs of all.

    Layer by layer, `summed` and `beside` are bytes of the other groups of the layer: of their sums while all are added up, and of
    what is left of them while this one is solved. `alike` is the number of groups of this shape that may be solved at once; 0:
    those of a layer's experts, where the model has some. `routed`: of an expert that is calibrated on its own tokens.
    `before` and `after` are the groups around this one, group by group.
    """

    name: str
    columns: int
    rows: int
    summed: int = 0
    beside: int = 0
    alike: int = 0
    routed: bool = False
    before: GroupShape | None = None
    after: GroupShape | None = None

    @classmethod
    def of(
        cls, names: dict[torch.nn.Module, str], modules: Sequence[torch.nn.Module]
    ) -> GroupShape:
        """The shape of some of the modules of `names`."""
        shapes = [tuple(module.weight.shape) for module in modules]  # type: ignore[arg-type]
        return cls(names[modules[0]], shapes[0][1], sum(rows for rows, _ in shapes))

    @classmethod
    def by_group(
        cls,
        model: torch.nn.Module,
        names: dict[torch.nn.Module, str],
        groups: Sequence[Sequence[torch.nn.Module]],
    ) -> list[GroupShape]:
        """Of a run that goes group by group."""
        routed = {module for experts in find_experts(model, names) for module in experts.modules}
        return in_order(
            [replace(cls.of(names, modules), routed=modules[0] in routed) for modules in groups]
        )

    @classmethod
    def by_layer(
        cls, model: torch.nn.Module, names: dict[torch.nn.Module, str]
    ) -> list[GroupShape]:
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
            layers.setdefault(_layer(routed.name), []).extend(
                found + [replace(one, alike=len(last)) for one in last]
            )
        groups: dict[tuple[str, int], list[torch.nn.Module]] = {}
        for module, name in left.items():
            columns: int = module.weight.shape[1]  # type: ignore[assignment, index]
            groups.setdefault((name.rpartition(".")[0], columns), []).append(module)
        for (name, _), modules in groups.items():
            layers.setdefault(_layer(name), []).append(cls.of(names, modules))
        return [_beside_others(one, layer) for layer in layers.values() for one in layer]


def in_order(groups: Sequence[GroupShape]) -> list[GroupShape]:
    """The groups of a run, each with those around it."""
    around = zip([None, *groups[:-1]], groups, [*groups[1:], None], strict=True)
    return [replace(one, before=before, after=after) for before, one, after in around]


def _layer(name: str) -> str:
    """The part of a module's name up to the number of its layer."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def _beside_others(group: GroupShape, layer: Sequence[GroupShape]) -> GroupShape:
    """With what the other groups of its layer keep beside it, at the most."""
    beside = _FLOAT32 * (sum(one.columns**2 for one in layer) - group.columns**2)
    lanes = _FLOAT32 * (
        sum(numbers_of_lane(one.columns) for one in layer) - numbers_of_lane(group.columns)
    )
    return replace(group, summed=beside + lanes, beside=beside)
