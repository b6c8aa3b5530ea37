"""The routed experts of a model: which modules hold them, and how they run while they are calibrated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.modeling.moe import context
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D

from rac_modifier.model_tools import StopForward

_FIRST, _LAST = ("gate_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class Expert:
    """One expert of a layer: `first` reads the tokens (gate and up), `last` what the activation makes of them (down).

    Both hold only what is pruned, so each may be empty.
    """

    name: str
    number: int
    module: torch.nn.Module
    first: list[torch.nn.Module]
    last: list[torch.nn.Module]

    @property
    def groups(self) -> list[list[torch.nn.Module]]:
        """The modules that read the same input, in the order in which they are pruned."""
        return [group for group in (self.first, self.last) if group]

    def read_by_last(self, x: torch.Tensor) -> torch.Tensor:
        """The input of down [tokens, width] for tokens `x` [tokens, hidden]."""
        found: list[torch.Tensor] = []

        def stop(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found.append(args[0])
            raise StopForward

        hook = getattr(self.module, _LAST).register_forward_pre_hook(stop)
        try:
            with contextlib.suppress(StopForward):
                self.module(x)
        finally:
            hook.remove()
        return found[0]


@dataclass(frozen=True)
class RoutedExperts:
    """The experts of a layer, as llm-compressor has them: called with all tokens and each token's expert numbers."""

    name: str
    module: LinearExperts2D
    experts: list[Expert]
    router: torch.nn.Module | None
    """Has a weight [experts, hidden], whose products with a token are the logits; None where there is no such module."""

    @property
    def modules(self) -> list[torch.nn.Module]:
        """All that is pruned of them."""
        return [module for expert in self.experts for group in expert.groups for module in group]


def find_experts(
    model: torch.nn.Module, names: Mapping[torch.nn.Module, str]
) -> list[RoutedExperts]:
    """The layers of routed experts with modules among `names`.

    Left out are those whose code is not llm-compressor's usual one: what their forward pass is given, or which linear layers
    read what, is not known.
    """
    found = []
    for name, module in model.named_modules():
        if not (
            isinstance(module, LinearExperts2D) and type(module).forward is LinearExperts2D.forward
        ):
            continue
        experts = [
            _expert(name, number, module[number], names) for number in range(module.num_experts)
        ]
        if any(expert is None for expert in experts):
            continue
        with_targets = [expert for expert in experts if expert is not None and expert.groups]
        if with_targets:
            found.append(
                RoutedExperts(name, module, with_targets, _router(model, name, module.num_experts))
            )
    return found


def _router(model: torch.nn.Module, name: str, experts: int) -> torch.nn.Module | None:
    """The module beside the experts with a row of weights per expert."""
    for module in model.get_submodule(name.rpartition(".")[0]).children():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == experts:
            return module
    return None


def _expert(
    name: str, number: int, module: torch.nn.Module, names: Mapping[torch.nn.Module, str]
) -> Expert | None:
    parts: dict[str, torch.nn.Module] = {
        child: part for child, part in module.named_modules() if isinstance(part, torch.nn.Linear)
    }
    if not parts.keys() <= {*_FIRST, _LAST} or _LAST not in parts:
        return None
    first = [part for child, part in parts.items() if child != _LAST and part in names]
    return Expert(
        f"{name}.{number}",
        number,
        module,
        first,
        [part for part in [parts[_LAST]] if part in names],
    )


@contextlib.contextmanager
def only_routed_tokens() -> Iterator[None]:
    """Run each expert on the tokens routed to it, whatever `oneshot`'s moe_calibrate_all_experts says."""
    with patch_attr(context, "_CALIBRATE_ALL_EXPERTS", False):
        yield
