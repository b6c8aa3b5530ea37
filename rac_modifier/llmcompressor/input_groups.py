"""Hessians of many modules from the inputs that pass them: one for all modules that read the same input."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from rac_modifier.errors import RacError
from rac_modifier.model_tools import StopForward
from rac_modifier.pruning.hessian import Hessian


@dataclass(eq=False)
class InputGroup:
    """Modules that read the same tensor (q/k/v, gate/up) and the Hessian of it; the first one accumulates."""

    modules: list[torch.nn.Module]
    hessian: Hessian
    first_batch: int
    current: tuple[int, torch.Tensor] | None = field(default=None, repr=False)

    def release(self) -> None:
        """Forget the last batch's input."""
        self.current = None


class HessianCollector:
    """Feed it every calibrated module's input; take the groups when a subgraph is done.

    Modules share a group when, in the batch that first reaches them, they get the very same tensor object. That they do so
    in every later batch is checked, since a Hessian cannot be split afterwards.

    `expected` names the modules of the subgraph being run: once each has been seen in a batch the forward is stopped
    with `StopForward`, unless the first batch showed that a module is called more than once.
    """

    def __init__(self, names: dict[torch.nn.Module, str]):
        self.names = names
        self.groups: dict[torch.nn.Module, InputGroup] = {}
        self._expected: frozenset[torch.nn.Module] = frozenset()
        self._batch = -1
        self._seen: dict[torch.nn.Module, int] = {}
        self._stoppable = True
        self._first = -1

    def expect(self, modules: Iterable[torch.nn.Module]) -> None:
        """Start of a subgraph that calibrates `modules`; an empty set never stops a forward."""
        self._expected = frozenset(modules)
        self._stoppable, self._batch, self._first, self._seen = True, -1, -1, {}

    def observe(self, module: torch.nn.Module, x: torch.Tensor, weights: torch.Tensor, batch: int) -> None:
        """Count input `x` [..., columns] of a module in batch number `batch`, token weights [rows, length].

        Raises:
            RacError: a module that sees only some of the tokens (a routed expert), so that weights cannot be told.
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
                    f"{self.names[module]} saw {x.shape[:-1].numel()} of the batch's {weights.numel()} tokens, so it is not "
                    "known which: let every expert see every token (oneshot's moe_calibrate_all_experts=True) or add it to ignore"
                )
            group.hessian.add(x, weights)
            group.current = (batch, x)
        elif group.current is None or group.current[0] != batch or group.current[1] is not x:
            raise RuntimeError(
                f"{self.names[module]} no longer reads the same input as {self.names[group.modules[0]]}; "
                "this model routes inputs in a way that shared Hessians do not cover"
            )
        # The last module of a subgraph must not be stopped in the first batch: it may be called again.
        if self._stoppable and batch != self._first and self._expected and self._seen.keys() >= self._expected:
            raise StopForward

    def take(self, modules: Iterable[torch.nn.Module]) -> list[InputGroup]:
        """Remove and return the groups that have a module among `modules`, in the order they were first reached."""
        done: dict[InputGroup, None] = {}
        for module in modules:
            group = self.groups.get(module)
            if group is not None:
                done[group] = None
        for group in done:
            group.release()
            for module in group.modules:
                del self.groups[module]
        return list(done)

    def _group(self, module: torch.nn.Module, x: torch.Tensor, batch: int) -> InputGroup:
        if module in self.groups:
            return self.groups[module]
        for group in {id(g): g for g in self.groups.values()}.values():
            if group.first_batch == batch and group.current is not None and group.current[1] is x:
                group.modules.append(module)
                self.groups[module] = group
                return group
        group = InputGroup([module], Hessian(x.shape[-1], x.device), batch)
        self.groups[module] = group
        return group
