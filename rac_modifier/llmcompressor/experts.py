"""Find the routed experts of a model, and report the tokens that calibrate them."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modeling.moe import context
from llmcompressor.modeling.moe.linear_experts import LinearExperts2D
from loguru import logger

from rac_modifier.errors import RacError
from rac_modifier.model_tools import StopForward
from rac_modifier.pruning.routed_tokens import ExpertTokens
from rac_modifier.settings.pruning import EXPERT_FLOOR, PruningSettings

_FIRST, _LAST = ("gate_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class Expert:
    """Hold the modules of an expert that are pruned.

    Attributes:
        first: gate and up, which read the tokens.
        last: down, which reads what the activation makes of gate and up.
    """

    name: str
    number: int
    module: torch.nn.Module
    first: list[torch.nn.Module]
    last: list[torch.nn.Module]

    @property
    def groups(self) -> list[list[torch.nn.Module]]:
        """Return the modules that read the same input, in pruning order."""
        return [group for group in (self.first, self.last) if group]

    def input_of_down(self, x: torch.Tensor) -> torch.Tensor:
        """Return what down reads [tokens, width] for tokens `x` [tokens, hidden]."""
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
    """Hold the experts of a layer; it is called with all tokens and their routes.

    Attributes:
        experts: those with modules that are pruned.
        router: has a weight [experts, hidden] that gives the logits; None if it is not
            known.
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
    """Return the layers of routed experts that have modules among `names`.

    A layer with a forward pass or children of another kind is left out: which of its linear
        layers
    reads what is not known.
    """
    layers = []
    for name, module in model.named_modules():
        if getattr(type(module), "forward", None) is not LinearExperts2D.forward:
            continue
        experts = []
        for number in range(module.num_experts):
            linears: dict[str, torch.nn.Module] = {
                child: m
                for child, m in module[number].named_modules()
                if isinstance(m, torch.nn.Linear)
            }
            if not linears.keys() <= {*_FIRST, _LAST} or _LAST not in linears:
                break
            first = [m for child, m in linears.items() if child != _LAST and m in names]
            last = [linears[_LAST]] if linears[_LAST] in names else []
            experts.append(Expert(f"{name}.{number}", number, module[number], first, last))
        else:
            if targeted := [expert for expert in experts if expert.groups]:
                router = _router(model, name, module.num_experts)
                layers.append(RoutedExperts(name, module, targeted, router))
    return layers


def _router(model: torch.nn.Module, name: str, experts: int) -> torch.nn.Module | None:
    """Return the module next to the experts with a row of weights per expert."""
    for module in model.get_submodule(name.rpartition(".")[0]).children():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == experts:
            return module
    return None


@contextlib.contextmanager
def only_routed_tokens() -> Iterator[None]:
    """Run each expert on its own tokens, against moe_calibrate_all_experts."""
    with patch_attr(context, "_CALIBRATE_ALL_EXPERTS", False):
        yield


class ExpertReport:
    """Log and record the tokens that calibrate routed experts; empty without experts."""

    def __init__(self, entry: PruningSettings, has_experts: bool):
        self._entry, self._has_experts, self._tokens = entry, has_experts, entry.experts
        self._why: dict[str, str] = {}
        self._layers: dict[str, dict[str, Any]] = {}

    def check(self, oneshot: Oneshot | None) -> None:
        """Refuse settings about experts without effect, or against `oneshot` (RacError)."""
        entry = self._entry
        for name, default in (("experts", "routed"), ("expert_floor", EXPERT_FLOOR)):
            value = getattr(entry, name)
            if value != default and name in entry.model_fields_set and not self._has_experts:
                raise RacError(
                    f"{name}: {value!r} has no effect here: no routed expert of this model "
                    "is pruned; leave it out"
                )
        routed_only = oneshot is not None and not oneshot.dataset_args.moe_calibrate_all_experts
        if self._has_experts and entry.experts == "all" and routed_only:
            raise RacError(
                "oneshot was given moe_calibrate_all_experts=False, and the recipe has "
                "experts: all; leave one of them out"
            )

    def use_order(self, order: str, why: str) -> None:
        """Record that a run layer by layer calibrates each expert on all tokens."""
        if order == "group" or not self._has_experts:
            return
        self._tokens, self._why = "all", {"why": f"layer by layer ({why})"}
        if self._entry.experts != "all" and self._entry.order != "layer":
            logger.warning(
                f"experts: {self._entry.experts} needs the model cut between its modules, "
                f"which is not possible here ({why}): each expert is calibrated on all "
                "tokens instead, which keeps less accuracy"
            )

    def add(self, name: str, tokens: Mapping[str, ExpertTokens]) -> None:
        """Record the tokens of each expert of the layer `name`, by the expert's name."""
        routed = [counts.routed for counts in tokens.values()]
        least, median, most = min(routed), statistics.median(routed), max(routed)
        starved = {e: counts for e, counts in tokens.items() if counts.added}
        starved = starved if self._tokens == "routed" else {}
        self._layers[name] = {
            "experts": len(tokens),
            "routed": {"least": least, "median": median, "most": most},
            "starved": {
                expert: {"routed": counts.routed, "added": counts.added}
                | ({"evenly": True} if counts.evenly else {})
                for expert, counts in starved.items()
            },
        }
        logger.info(
            f"{name}: {least:,} to {most:,} tokens are routed to each of {len(tokens)} "
            f"experts, median {median:,}"
        )
        if starved:
            evenly = any(counts.evenly for counts in starved.values())
            added = "evenly spread tokens (the router is unknown)" if evenly else "the nearest ones"
            logger.warning(
                f"{name}: fewer than expert_floor ({self._entry.expert_floor:,}) tokens "
                f"are routed to {len(starved)} experts; {added} were added to calibrate "
                "them; raise calibration.tokens for more of their own"
            )

    def record(self) -> dict[str, Any]:
        """Return the entry of the run record; empty without routed experts."""
        if not self._has_experts:
            return {}
        floor = {"floor": self._entry.expert_floor} if self._tokens == "routed" else {}
        return {
            "experts": {"calibrated on": self._tokens, **self._why, **floor, "layers": self._layers}
        }
