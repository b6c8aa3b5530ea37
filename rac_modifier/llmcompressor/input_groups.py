"""Modules that read the same input, with the statistics of that input; and how they are found while a model runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from compressed_tensors.utils import align_module_device

from rac_modifier.errors import RacError
from rac_modifier.model_tools import StopForward
from rac_modifier.pruning.hessian import Statistics


@dataclass(eq=False)
class InputGroup:
    """Modules that read the same tensor (q/k/v, gate/up), and the statistics of that tensor. They are pruned together."""

    modules: list[torch.nn.Module]
    statistics: Statistics

    @classmethod
    def of(
        cls, modules: list[torch.nn.Module], device: torch.device, *, with_cross_moment: bool
    ) -> InputGroup:
        """With empty statistics on `device`."""
        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.enter_context(align_module_device(module))
            weights: list[torch.Tensor] = [module.weight.detach() for module in modules]  # type: ignore[operator]
        return cls(
            modules, Statistics(weights[0].shape[1], device, weights if with_cross_moment else None)
        )


class HessianCollector:
    """Collects the input groups of the modules that run: each module's input is observed, and complete groups are taken.

    Two modules belong to the same group when, in the batch in which they first run, they get the very same tensor object.
    Later batches are checked to be the same, because a Hessian cannot be split afterwards.

    `expect` gives the modules of the part of the model that runs. When all of them were seen in a batch, the forward pass is
    stopped with `StopForward`, unless a module was called more than once in the first batch.
    """

    def __init__(self, names: dict[torch.nn.Module, str]):
        self.names = names
        self.groups: dict[torch.nn.Module, InputGroup] = {}
        self._first_batch: dict[InputGroup, int] = {}
        # batch number and input, which lives no longer for it: where it is gone, no other module can be given it
        self._latest: dict[InputGroup, tuple[int, weakref.ref[torch.Tensor]]] = {}
        self._expected: frozenset[torch.nn.Module] = frozenset()
        self._batch = -1
        self._seen: dict[torch.nn.Module, int] = {}
        self._stoppable = True
        self._first = -1

    def expect(self, modules: Iterable[torch.nn.Module]) -> None:
        """Start of a part of the model with these calibrated `modules`; without any, no forward pass is stopped."""
        self._expected = frozenset(modules)
        self._stoppable, self._batch, self._first, self._seen = True, -1, -1, {}

    def observe(
        self, module: torch.nn.Module, x: torch.Tensor, weights: torch.Tensor, batch: int
    ) -> None:
        """Add the input `x` [..., columns] of a module in batch number `batch`, with token weights [rows, length].

        Raises:
            RacError: a module that gets only some of the tokens (a routed expert), so their weights are unknown.
            StopForward: when the rest of this forward pass is not needed.
        """
        if batch != self._batch:
            if self._first < 0:
                self._first = batch
            self._batch, self._seen = batch, {}
        self._seen[module] = self._seen.get(module, 0) + 1
        if batch == self._first and self._seen[module] > 1:
            self._stoppable = False
        group = self._group(module, x, batch)
        if group.modules[0] is module:
            if x.shape[:-1].numel() != weights.numel():
                raise RacError(
                    f"{self.names[module]} got {x.shape[:-1].numel()} of the {weights.numel()} tokens of the batch, and it is "
                    "unknown which ones: give every expert every token (oneshot's moe_calibrate_all_experts=True) or add it "
                    "to ignore"
                )
            group.statistics.add(x, weights)
            self._latest[group] = (batch, weakref.ref(x))
        elif self._input_of(group, batch) is not x:
            raise RuntimeError(
                f"{self.names[module]} no longer reads the same input as {self.names[group.modules[0]]}; "
                "this model routes inputs in a way that one Hessian for both does not cover"
            )
        # Not in the first batch: a module may be called again later in the pass, which only a whole pass shows.
        if (
            self._stoppable
            and batch != self._first
            and self._expected
            and self._seen.keys() >= self._expected
        ):
            raise StopForward

    def present(self) -> list[InputGroup]:
        """The groups that are not taken yet, in the order in which their modules ran first."""
        return list(dict.fromkeys(self.groups.values()))

    def take(self, modules: Iterable[torch.nn.Module]) -> list[InputGroup]:
        """Remove and return the groups that have a module among `modules`, in the order of these."""
        done = list(
            dict.fromkeys(self.groups[module] for module in modules if module in self.groups)
        )
        for group in done:
            self._latest.pop(group, None)
            del self._first_batch[group]
            for module in group.modules:
                del self.groups[module]
        return done

    def _group(self, module: torch.nn.Module, x: torch.Tensor, batch: int) -> InputGroup:
        if module in self.groups:
            return self.groups[module]
        for group, first in self._first_batch.items():
            if first == batch and self._input_of(group, batch) is x:
                group.modules.append(module)
                self.groups[module] = group
                return group
        group = self.groups[module] = InputGroup([module], Statistics(x.shape[-1], x.device))
        self._first_batch[group] = batch
        return group

    def _input_of(self, group: InputGroup, batch: int) -> torch.Tensor | None:
        """The input of a group in this batch; None when it has not been observed yet."""
        latest = self._latest.get(group)
        return latest[1]() if latest is not None and latest[0] == batch else None
