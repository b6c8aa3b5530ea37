"""What the calibration loops need from the modifier that prunes; the one place where both sides meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel

from rac_modifier.llmcompressor.input_groups import InputGroup
from rac_modifier.processes import Processes
from rac_modifier.pruning.routed_tokens import ExpertTokens
from rac_modifier.settings.presets import Order


class Pruner(Protocol):
    """A modifier whose modules are pruned group by group or layer by layer."""

    @property
    def order(self) -> Order:
        """The order that the recipe asks for."""

    @property
    def gains_at_once(self) -> bool:
        """Whether small groups are solved faster at once."""

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's activations have to be carried beside the pruned model's."""

    @property
    def experts(self) -> Literal["routed", "all"]:
        """The tokens that a routed expert is calibrated on, as the recipe says."""

    @property
    def expert_floor(self) -> int:
        """Least tokens of a routed expert."""

    @property
    def processes(self) -> Processes:
        """Those that share the run."""

    def calibrated_modules(self) -> dict[torch.nn.Module, str]:
        """The modules to prune, and their names."""

    def use_order(self, order: Literal["group", "layer"], why: str) -> None:
        """Record the order that the pipeline chose; refuse it where the recipe needs the other one."""

    def check_memory(
        self,
        model: PreTrainedModel,
        groups: list[list[torch.nn.Module]],
        onload: torch.device,
        offload: torch.device,
    ) -> int:
        """Refuse to start where the largest of these groups (none: of the modules) needs more memory than is free.

        Returns:
            0; or, where it fits only if stages run twice before those that read so many columns, that number (pruned_stream.py).
        """

    def resume(self) -> None:
        """Find what a run of the same recipe, model and calibration set had pruned before it was killed."""

    def was_pruned(self, modules: Iterable[torch.nn.Module]) -> bool:
        """Whether all of these were pruned before the last run was killed; they need no statistics then."""

    def restore(self, modules: Iterable[torch.nn.Module]) -> None:
        """Put the pruned weights of these modules back."""

    def on_subgraph_start(self, modules: Iterable[torch.nn.Module]) -> None:
        """Layer by layer: the coming forward passes run these modules."""

    def end_lanes(self, count: int) -> None:
        """Layer by layer: so many lanes of the calibration set have ended."""

    def prune_groups(self, groups: Sequence[InputGroup], together: int | None = None) -> None:
        """Group by group: prune modules that read the same input, on its statistics; groups that do not depend on each other.

        `together` is how many of them are solved at once; None: as many as save time.
        """

    def record_experts(self, name: str, tokens: Mapping[str, ExpertTokens]) -> None:
        """Record what the experts of the layer `name` were calibrated on, by their names."""
