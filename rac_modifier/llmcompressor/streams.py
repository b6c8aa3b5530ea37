"""The activations of a model on their way through the stages of a run by group, batch by batch, in upstream's cache.

`Stream` is the pruned model's, `DenseStream` the dense model's, where the target of a module is the dense model's output, and
`NoStream` stands for that one where it is not needed.

Before a stage that reads more columns than the stage before it (down after gate/up) activations are several times as wide as
the residual stream. Both streams can wait there: the earlier stage runs when a batch is read, so that no more than one batch
of the wide inputs lives. The dense stream does so by keeping the dense weights of the earlier stage, where that takes less
memory. The pruned stream runs the earlier stage a second time later, so it does so only where memory is short.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.pipelines.cache import IntermediatesCache

from rac_modifier.llmcompressor.plan import Stage
from rac_modifier.platform import return_freed_memory


class Stream:
    """The pruned model's inputs of stage after stage, beginning with those in `cache`.

    With `recomputed` columns, stages before one that reads that many run twice instead of keeping its inputs; 0: none does.
    """

    def __init__(self, model: torch.nn.Module, cache: IntermediatesCache, recomputed: int = 0):
        self.cache = cache
        self._model, self._recomputed = model, recomputed
        self._late: Stage | None = None  # the stage that has not run yet

    def inputs(self, stage: Stage, batch: int) -> torch.Tensor:
        """Return what the modules of `stage` read in a batch, [rows, length, columns]."""
        if self._late is None:
            return _read(stage, self.cache, batch)
        # without a device to offload to, outputs stay where they are
        copy = IntermediatesCache([dict(self.cache.batch_intermediates[batch])], None)
        self._late.run(self._model, copy, 0)
        return _read(stage, copy, 0)

    def advance(self, stage: Stage, after: Stage) -> None:
        """Run `stage`, whose modules are pruned, for all batches; later, if the inputs of `after` are recomputed."""
        if self._late is None and _widens(stage, after) and after.columns == self._recomputed:
            self._late = stage
            return
        return_freed_memory()
        for batch in range(len(self.cache)):
            if self._late is not None:
                self._late.run(self._model, self.cache, batch)
            stage.run(self._model, self.cache, batch)
        self._late = None


class NoStream:
    """The dense model's activations where no target needs them."""

    carries = False
    cache: IntermediatesCache | None = None

    def enter(self, stage: Stage, after: Stage | None) -> None:
        """Do nothing, as all methods of this class."""

    def inputs(self, stage: Stage, batch: int) -> torch.Tensor | None:
        """Return None."""
        return None

    def advance(self, stage: Stage, batch: int) -> None:
        """Do nothing."""

    def advance_all(self, stage: Stage) -> None:
        """Do nothing."""

    def leave(self, stage: Stage) -> None:
        """Do nothing."""


class DenseStream(NoStream):
    """The dense model's inputs of stage after stage, beginning where nothing is pruned yet.

    A stage is entered, its batches are read and advanced one by one while its modules are dense, and it is left.

    Args:
        model: whose modules are dense until a stage is left.
        cache: activations of the pruned model, which are the dense model's as long as nothing is pruned.
        tokens: in all batches.
    """

    carries = True

    def __init__(self, model: torch.nn.Module, cache: IntermediatesCache, tokens: int):
        batches = [dict(batch) for batch in cache.batch_intermediates]
        self.cache = IntermediatesCache(batches, cache.offload_device)
        self._model, self._tokens = model, tokens
        self._late: Stage | None = None  # the stage before, which waited
        self._weights: dict[torch.nn.Module, torch.Tensor] = {}  # its dense weights
        self._behind: set[int] = set()  # batches that it has not run for
        self._after: Stage | None = None
        self._waits = False

    def enter(self, stage: Stage, after: Stage | None) -> None:
        """Begin `stage`; `after` is the next one, None at the end."""
        self._after = after
        self._waits = after is not None and saves_by_waiting(stage, after, self._tokens)

    def inputs(self, stage: Stage, batch: int) -> torch.Tensor:
        """Return what the modules of `stage` read in a batch in the dense model, [rows, length, columns]."""
        assert self.cache is not None
        self._catch_up(batch)
        return _read(stage, self.cache, batch)

    def advance(self, stage: Stage, batch: int) -> None:
        """Run a stage whose modules are still dense for a batch; not where it waits, and at the end the batch is dropped."""
        assert self.cache is not None
        self._catch_up(batch)
        if self._after is None:
            self.cache.delete(batch)
        elif not self._waits:
            stage.run(self._model, self.cache, batch)
            return_freed_memory()  # its blocks lie between those that stay

    def advance_all(self, stage: Stage) -> None:
        """Advance all batches, and leave the stage."""
        assert self.cache is not None
        for batch in range(len(self.cache)):
            self.advance(stage, batch)
        self.leave(stage)

    def leave(self, stage: Stage) -> None:
        """End `stage`, whose modules are pruned next: where it waits, keep a copy of their weights."""
        self._late, self._weights = None, {}
        if self._waits:
            assert self.cache is not None
            self._late, self._behind = stage, set(range(len(self.cache)))
            self._weights = {m: m.get_parameter("weight").detach().clone() for m in stage.modules}

    def _catch_up(self, batch: int) -> None:
        """Run the stage that waited for a batch, with its dense weights."""
        if self._late is None or batch not in self._behind:
            return
        assert self.cache is not None
        self._behind.remove(batch)
        with _with_weights(self._weights):
            self._late.run(self._model, self.cache, batch)
        return_freed_memory()


def saves_by_waiting(stage: Stage, after: Stage, tokens: int) -> bool:
    """Return whether the weights of `stage` take less than the wider inputs of `after`, so that the dense stream waits."""
    if not _widens(stage, after):
        return False
    if any(type(module).forward is not torch.nn.Linear.forward for module in stage.modules):
        return False
    weights = sum(module.get_parameter("weight").numel() for module in stage.modules)
    return tokens * (after.columns - stage.columns) > weights


def _widens(stage: Stage, after: Stage) -> bool:
    """Return whether `after` reads more columns than `stage`; False for routed experts, which read all batches at once."""
    return 0 < stage.columns < after.columns


def _read(stage: Stage, cache: IntermediatesCache, batch: int) -> torch.Tensor:
    (x,) = cache.fetch(batch, [str(stage.reads)]).values()
    return x


@contextlib.contextmanager
def _with_weights(weights: dict[torch.nn.Module, torch.Tensor]) -> Iterator[None]:
    """Let linear layers compute with these weights instead of their own."""
    with contextlib.ExitStack() as stack:
        for module, weight in weights.items():

            def forward(
                x: torch.Tensor,
                bias: torch.Tensor | None = module.bias,  # type: ignore[assignment]
                weight: torch.Tensor = weight,
            ) -> torch.Tensor:
                return torch.nn.functional.linear(x, weight, bias)

            stack.enter_context(patch_attr(module, "forward", forward))
        yield
