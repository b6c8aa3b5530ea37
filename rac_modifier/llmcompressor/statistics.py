"""Hold what modules read: the dense model's activations, and statistics.

`DenseStream` has the dense model's activations, and `NoStream` is used if no target needs
those. The pruned model's are in upstream's cache.

Before a stage that reads more columns than the one before it (down after gate/up),
activations are several times as wide as the residual stream. The dense stream waits there:
the earlier stage runs, with a copy of its dense weights, when a batch is read, so that one
batch of the wide inputs lives.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from compressed_tensors.utils import align_module_device, patch_attr
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.distributed.processes import Processes
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.plan import Stage
from rac_modifier.pruning.hessian import Statistics
from rac_modifier.runtime.cpu_tuning import return_freed_memory


class NoStream:
    """Hold nothing: no target needs the dense model's activations."""

    cache: IntermediatesCache | None = None

    def enter(self, stage: Stage, after: Stage | None) -> None:
        """Begin `stage`; `after` is the next one, None at the end."""

    def inputs(self, stage: Stage, batch: int) -> Tensor | None:
        """Return what `stage` reads in a batch in the dense model, or None."""

    def advance(self, stage: Stage, batch: int) -> None:
        """Run `stage`, whose modules are dense, for a batch, unless it waits."""

    def leave(self, stage: Stage) -> None:
        """End `stage`, whose modules are pruned next."""

    def advance_all(self, stage: Stage) -> None:
        """Advance all batches, and leave the stage."""


class DenseStream(NoStream):
    """Hold the dense model's inputs of a stage; made with a copy of `cache` of the dense model."""

    cache: IntermediatesCache

    def __init__(
        self, model: torch.nn.Module, cache: IntermediatesCache, loader: CalibrationLoader
    ):
        batches = [dict(batch) for batch in cache.batch_intermediates]
        self.cache = IntermediatesCache(batches, cache.offload_device)
        self._model = model
        self._tokens = sum(weights.numel() for weights in loader.token_weights)
        self._late: Stage | None = None  # the stage before, which waited
        self._weights: dict[torch.nn.Module, Tensor] = {}  # its dense weights
        self._behind: set[int] = set()  # batches that it has not run for
        self._after: Stage | None = None
        self._waits = False

    def enter(self, stage: Stage, after: Stage | None) -> None:
        """Begin `stage`; `after` is the next one, None at the end."""
        self._after = after
        self._waits = after is not None and saves_by_waiting(stage, after, self._tokens)

    def inputs(self, stage: Stage, batch: int) -> Tensor:
        """Return what `stage` reads in the dense model, [rows, length, columns]."""
        self._catch_up(batch)
        return stage.read(self.cache, batch)

    def advance(self, stage: Stage, batch: int) -> None:
        """Run `stage` for a batch, unless it waits; the last stage drops the batch."""
        self._catch_up(batch)
        if self._after is None:
            self.cache.delete(batch)
        elif not self._waits:
            stage.run(self._model, self.cache, batch)
            return_freed_memory()  # its blocks lie between those that stay

    def advance_all(self, stage: Stage) -> None:
        """Advance all batches, and leave the stage."""
        for batch in range(len(self.cache)):
            self.advance(stage, batch)
        self.leave(stage)

    def leave(self, stage: Stage) -> None:
        """End `stage`, whose modules are pruned next; if it waits, copy their weights."""
        self._late, self._weights = None, {}
        if self._waits:
            self._late, self._behind = stage, set(range(len(self.cache)))
            self._weights = {m: m.get_parameter("weight").detach().clone() for m in stage.modules}

    def _catch_up(self, batch: int) -> None:
        """Run the stage that waited for a batch, with its dense weights."""
        if self._late is not None and batch in self._behind:
            self._behind.remove(batch)
            with _with_weights(self._weights):
                self._late.run(self._model, self.cache, batch)
            return_freed_memory()


def saves_by_waiting(stage: Stage, after: Stage, tokens: int) -> bool:
    """Return whether `stage` has smaller weights than `after` has wider inputs."""
    plain = all(type(module).forward is torch.nn.Linear.forward for module in stage.modules)
    weights = sum(module.get_parameter("weight").numel() for module in stage.modules)
    wider = tokens * (after.columns - stage.columns)
    return plain and stage.columns > 0 and wider > weights  # routed experts have 0 columns


@contextlib.contextmanager
def _with_weights(weights: dict[torch.nn.Module, Tensor]) -> Iterator[None]:
    """Make linear layers compute with these weights."""
    with contextlib.ExitStack() as stack:
        for module, weight in weights.items():

            def forward(x: Tensor, weight: Tensor = weight, bias: Any = module.bias) -> Tensor:
                return torch.nn.functional.linear(x, weight, bias)

            stack.enter_context(patch_attr(module, "forward", forward))
        yield


@dataclass(eq=False)
class InputGroup:
    """Hold modules that read one tensor (q/k/v, gate/up), and its statistics."""

    modules: list[torch.nn.Module]
    statistics: Statistics

    @classmethod
    def of(
        cls,
        modules: Sequence[torch.nn.Module],
        device: torch.device,
        processes: Processes,
        *,
        dense_target: bool,
    ) -> Self:
        """Return a group with empty statistics, for either target."""
        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.enter_context(align_module_device(module))
            weights = [module.get_parameter("weight").detach() for module in modules]
        targets = weights if dense_target else None
        return cls(list(modules), Statistics(weights[0].shape[1], device, targets, processes))


class Collector:
    """Collect the `groups` of a layer while it runs: modules that read the same tensor object."""

    def __init__(self, names: Mapping[torch.nn.Module, str], processes: Processes):
        self.groups: list[InputGroup] = []
        self.inputs: dict[InputGroup, Tensor] = {}
        self._names, self._processes = names, processes
        self._group_of: dict[torch.nn.Module, InputGroup] = {}

    def observe(self, module: torch.nn.Module, x: Tensor, weights: Tensor, *, first: bool) -> None:
        """Add a module's input `x` [..., columns] with token `weights` [rows, length]."""
        group = self._group_of.get(module)
        if group is None:
            group = next((g for g in self.groups if first and self.inputs.get(g) is x), None)
            if group is None:
                statistics = Statistics(x.shape[-1], x.device, processes=self._processes)
                group = InputGroup([], statistics)
                self.groups.append(group)
            group.modules.append(module)
            self._group_of[module] = group
        if group.modules[0] is module:
            tokens = x.shape[:-1].numel()
            if tokens != weights.numel():
                raise RacError(
                    f"{self._names[module]} got {tokens} of the {weights.numel()} tokens "
                    "of the batch, and it is unknown which: give every expert every token "
                    "(oneshot's moe_calibrate_all_experts=True) or add it to ignore"
                )
            group.statistics.add(x, weights)
            self.inputs[group] = x
        elif self.inputs.get(group) is not x:
            raise RacError(
                f"{self._names[module]} no longer reads the same input as "
                f"{self._names[group.modules[0]]}, whose Hessian it shares: add both to ignore"
            )


def check_same_groups(
    groups: Sequence[InputGroup], names: Mapping[torch.nn.Module, str], processes: Processes
) -> None:
    """Refuse groups that differ between ranks (RacError)."""
    first, *listings = processes.from_all([[names[m] for m in group.modules] for group in groups])
    for rank, listing in enumerate(listings, 1):
        if listing != first:
            ours, theirs = ({name for group in g for name in group} for g in (first, listing))
            only = sorted(ours ^ theirs) or ["the same modules in other groups"]
            raise RacError(
                f"process 0 and process {rank} have not calibrated the same modules "
                f"({', '.join(only[:3])}): some got no token of a process's share. Add "
                "them to ignore, calibrate on more tokens, or start fewer processes"
            )
