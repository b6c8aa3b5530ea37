"""Collect the statistics of what modules read: of a stage by group from the streams, of a layer by hooks."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.utils import align_module_device
from llmcompressor.pipelines.cache import IntermediatesCache

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.plan import Stage
from rac_modifier.llmcompressor.streams import NoStream, Stream
from rac_modifier.model_tools import StopForward
from rac_modifier.platform import return_freed_memory
from rac_modifier.processes import Processes
from rac_modifier.pruning.hessian import Statistics


@dataclass(eq=False)
class InputGroup:
    """Modules that read the same tensor (q/k/v, gate/up), and the statistics of that tensor. They are pruned together."""

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
    ) -> InputGroup:
        """Return a group with empty statistics on `device`; with a cross moment for the dense target."""
        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.enter_context(align_module_device(module))
            weights = [module.get_parameter("weight").detach() for module in modules]
        of = weights if dense_target else None
        return cls(list(modules), Statistics(weights[0].shape[1], device, of, processes))


def collect(
    stage: Stage,
    pruned: Stream,
    dense: NoStream,
    loader: CalibrationLoader,
    processes: Processes,
) -> InputGroup:
    """Collect what the modules of a stage by group read; the dense stream is advanced on the way."""
    group = None
    for batch, weights in enumerate(loader.token_weights):
        x, x_dense = pruned.inputs(stage, batch), dense.inputs(stage, batch)
        group = group or InputGroup.of(
            stage.modules, x.device, processes, dense_target=x_dense is not None
        )
        group.statistics.add(x, weights, x_dense)
        del x, x_dense  # before the batch is advanced
        group.statistics.end_shards(loader.shards_ended[batch])
        dense.advance(stage, batch)
    assert group is not None, "a loader has at least one batch"
    return group


class Collector:
    """Collect the groups of a layer while it runs: the input of each module is observed, complete groups are taken.

    Two modules belong to one group when, in the batch in which they first run, they read the same tensor object. Later batches
    are checked to be the same, because a Hessian cannot be split afterwards.
    """

    def __init__(self, names: Mapping[torch.nn.Module, str], processes: Processes):
        self.names, self._processes = names, processes
        self.groups: dict[torch.nn.Module, InputGroup] = {}
        self._first_batch: dict[InputGroup, int] = {}
        # Batch number and input of each group. The reference is weak: where the input is freed, no module can read it.
        self._latest: dict[InputGroup, tuple[int, weakref.ref[torch.Tensor]]] = {}

    def observe(
        self, module: torch.nn.Module, x: torch.Tensor, weights: torch.Tensor, batch: int
    ) -> None:
        """Add the input `x` [..., columns] of a module in batch number `batch`, with token weights [rows, length].

        Raises:
            RacError: a module that reads only some of the tokens (a routed expert), so their weights are unknown.
        """
        group = self._group(module, x, batch)
        if group.modules[0] is module:
            tokens = x.shape[:-1].numel()
            if tokens != weights.numel():
                raise RacError(
                    f"{self.names[module]} got {tokens} of the {weights.numel()} tokens of the batch, and it is "
                    "unknown which ones: give every expert every token (oneshot's moe_calibrate_all_experts=True) or add it "
                    "to ignore"
                )
            group.statistics.add(x, weights)
            self._latest[group] = (batch, weakref.ref(x))
        elif self._input_of(group, batch) is not x:
            raise RacError(
                f"{self.names[module]} no longer reads the same input as {self.names[group.modules[0]]}; this model "
                "routes inputs in a way that one Hessian for both does not cover: add both to ignore"
            )

    def present(self) -> list[InputGroup]:
        """Return the groups that are not taken yet, in the order in which their modules ran first."""
        return list(dict.fromkeys(self.groups.values()))

    def take(self, modules: Iterable[torch.nn.Module]) -> list[InputGroup]:
        """Remove and return the groups that have a module among `modules`, in the order of these."""
        taken = list(dict.fromkeys(self.groups[m] for m in modules if m in self.groups))
        for group in taken:
            self._latest.pop(group, None)
            del self._first_batch[group]
            for module in group.modules:
                del self.groups[module]
        return taken

    def _group(self, module: torch.nn.Module, x: torch.Tensor, batch: int) -> InputGroup:
        if module in self.groups:
            return self.groups[module]
        for group, first in self._first_batch.items():
            if first == batch and self._input_of(group, batch) is x:
                group.modules.append(module)
                self.groups[module] = group
                return group
        group = self.groups[module] = InputGroup(
            [module], Statistics(x.shape[-1], x.device, processes=self._processes)
        )
        self._first_batch[group] = batch
        return group

    def _input_of(self, group: InputGroup, batch: int) -> torch.Tensor | None:
        """Return the input of a group in this batch; None where it was not observed yet."""
        latest = self._latest.get(group)
        return latest[1]() if latest is not None and latest[0] == batch else None


def collect_layer(
    stage: Stage,
    model: torch.nn.Module,
    cache: IntermediatesCache,
    loader: CalibrationLoader,
    names: Mapping[torch.nn.Module, str],
    processes: Processes,
) -> list[InputGroup]:
    """Collect the groups of a stage by layer, in one pass over the batches.

    A pass ends as soon as all modules have run, since the Hessians do not need what comes after. The first batch runs whole: only
    that shows whether a module is called twice, and then no pass is ended early.
    """
    collector, calls, batch = Collector(names, processes), dict[torch.nn.Module, int](), 0
    early = False

    def observe(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        calls[module] = calls.get(module, 0) + 1
        collector.observe(module, args[0], loader.token_weights[batch], batch)
        if early and len(calls) == len(stage.modules):
            raise StopForward

    with _hooks(stage.modules, observe):
        for batch in range(len(loader)):
            calls.clear()
            with contextlib.suppress(StopForward):
                stage.look(model, cache, batch)
            if batch == 0:
                early = set(calls) == set(stage.modules) and max(calls.values()) == 1
            end_shards(collector.present(), names, processes, loader.shards_ended[batch])
            # upstream's frames and the exception refer to each other; that cycle would keep this batch's activations
            gc.collect(1)
            return_freed_memory()  # blocks of the batch lie between the sums, which stay
    return collector.take(stage.modules)


@contextlib.contextmanager
def _hooks(modules: Iterable[torch.nn.Module], hook: Any) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def end_shards(
    groups: Sequence[InputGroup],
    names: Mapping[torch.nn.Module, str],
    processes: Processes,
    count: int,
) -> None:
    """Close `count` shards of the calibration set on every rank and reduce the sums of all groups.

    Raises:
        RacError: the ranks have calibrated different modules.
    """
    for _ in range(count):
        check_same_groups(groups, names, processes)
        for group in groups:
            group.statistics.end_shards(1)


def check_same_groups(
    groups: Sequence[InputGroup], names: Mapping[torch.nn.Module, str], processes: Processes
) -> None:
    """Refuse groups that differ between ranks: their sums would be of different modules (RacError)."""
    first, *others = processes.from_all([[names[m] for m in group.modules] for group in groups])
    for rank, other in enumerate(others, 1):
        if other != first:
            ours, theirs = ({name for group in g for name in group} for g in (first, other))
            only = sorted(ours ^ theirs) or ["the same modules in other groups"]
            raise RacError(
                f"process 0 and process {rank} have not calibrated the same modules ({', '.join(only[:3])}): some got no token "
                "of the share of one of them. Add them to ignore, calibrate on more tokens, or start fewer processes"
            )
