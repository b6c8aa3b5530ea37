"""The pruned model's activations, where a run goes group by group: what each stage reads, batch by batch.

By default a stage runs as soon as its modules are pruned, so that what the next one reads is kept for all batches. Before the
widest stage of a layer (down) that is several times the residual stream. Where it does not fit into memory, the stage before it
(gate and up) runs twice: once for the statistics of down, where each batch is dropped at once, and again together with down. The
results are the same bits.
"""

from __future__ import annotations

import torch
from llmcompressor.pipelines.cache import IntermediatesCache

from rac_modifier.freed_memory import return_freed_memory
from rac_modifier.llmcompressor.group_shape import GroupShape, widens
from rac_modifier.llmcompressor.stages import Stage


class PrunedStream:
    """The inputs of stage after stage, beginning with those in `cache`.

    Stages before those whose modules read `twice_before` columns run twice; 0: none does.
    """

    def __init__(self, model: torch.nn.Module, cache: IntermediatesCache, *, twice_before: int):
        self.cache = cache
        self._model, self._twice_before = model, twice_before
        self._late: Stage | None = None  # what was run for statistics alone

    def inputs(self, stage: Stage, batch: int) -> torch.Tensor:
        """What the modules of `stage` read in one batch."""
        if self._late is None:
            return read(stage, self.cache, batch)
        # with no device to offload to, what is made here stays where it is
        here = IntermediatesCache([dict(self.cache.batch_intermediates[batch])], None)
        self._late.run(self._model, here, 0)
        return read(stage, here, 0)

    def run(self, stage: Stage, after: Stage) -> None:
        """Move all batches on through `stage`, whose modules are pruned; later, if `after` reads more and that does not fit."""
        if self._waits(stage, after):
            self._late = stage
            return
        return_freed_memory()
        for batch in range(len(self.cache)):
            for each in (self._late, stage):
                if each is not None:
                    each.run(self._model, self.cache, batch)
            return_freed_memory()
        self._late = None

    def _waits(self, stage: Stage, after: Stage) -> bool:
        """As the memory prediction counts it."""
        if (
            stage.experts is not None
            or after.experts is not None
            or not (stage.modules and after.modules)
        ):
            return False
        here, then = (
            GroupShape.of(dict.fromkeys(each.modules, ""), each.modules) for each in (stage, after)
        )
        return widens(here, then, self._twice_before)


def read(stage: Stage, cache: IntermediatesCache, batch: int) -> torch.Tensor:
    """What a cache has of one batch for the modules of a stage."""
    (x,) = cache.fetch(batch, [str(stage.reads)]).values()
    return x
