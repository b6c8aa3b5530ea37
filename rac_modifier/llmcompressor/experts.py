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
    """One expert of a layer.

    Attributes:
        name, number: of the expert.
        module: the expert itself.
        first: gate and up, as far as they are pruned; they read the tokens.
        last: down, if it is pruned; it reads what the activation makes of them.
    """

    name: str
    number: int
    module: torch.nn.Module
    first: list[torch.nn.Module]
    last: list[torch.nn.Module]

    @property
    def groups(self) -> list[list[torch.nn.Module]]:
        """Return the modules that read the same input, in the order in which they are pruned."""
        return [group for group in (self.first, self.last) if group]

    def read_by_last(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input of down [tokens, width] for tokens `x` [tokens, hidden]."""
        inputs: list[torch.Tensor] = []

        def stop(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            inputs.append(args[0])
            raise StopForward

        hook = getattr(self.module, _LAST).register_forward_pre_hook(stop)
        try:
            with contextlib.suppress(StopForward):
                self.module(x)
        finally:
            hook.remove()
        return inputs[0]


@dataclass(frozen=True)
class RoutedExperts:
    """The experts of a layer, as llm-compressor calls them: with all tokens, and the numbers of each token's experts.

    Attributes:
        name, module: of the layer of experts.
        experts: those with modules that are pruned.
        router: has a weight [experts, hidden] whose matmul with a token gives the logits; None where no such module is known.
    """

    name: str
    module: LinearExperts2D
    experts: list[Expert]
    router: torch.nn.Module | None

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Return all modules that are pruned."""
        return [module for expert in self.experts for group in expert.groups for module in group]


def find_experts(
    model: torch.nn.Module, names: Mapping[torch.nn.Module, str]
) -> list[RoutedExperts]:
    """Return the layers of routed experts with modules among `names`.

    Layers with code of their own are left out: it is not known what their forward pass is given, or which linear layers read
    what.
    """
    layers = []
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
            router = _router(model, name, module.num_experts)
            layers.append(RoutedExperts(name, module, with_targets, router))
    return layers


def _router(model: torch.nn.Module, name: str, experts: int) -> torch.nn.Module | None:
    """Return the module next to the experts with a row of weights per expert."""
    for module in model.get_submodule(name.rpartition(".")[0]).children():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == experts:
            return module
    return None


def _expert(
    name: str, number: int, module: torch.nn.Module, names: Mapping[torch.nn.Module, str]
) -> Expert | None:
    linears: dict[str, torch.nn.Module] = {
        child: m for child, m in module.named_modules() if isinstance(m, torch.nn.Linear)
    }
    if not linears.keys() <= {*_FIRST, _LAST} or _LAST not in linears:
        return None
    first = [m for child, m in linears.items() if child != _LAST and m in names]
    last = [m for m in [linears[_LAST]] if m in names]
    return Expert(f"{name}.{number}", number, module, first, last)


@contextlib.contextmanager
def only_routed_tokens() -> Iterator[None]:
    """Run each expert on the tokens routed to it, whatever `oneshot`'s moe_calibrate_all_experts says."""
    with patch_attr(context, "_CALIBRATE_ALL_EXPERTS", False):
        yield
