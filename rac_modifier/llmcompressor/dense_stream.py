"""The dense model's activations, where a run goes group by group towards the dense model's outputs.

They are moved on stage by stage, like the pruned model's, each time before the modules of a stage are pruned. Before the widest
stage of a layer (down, whose input is several times as wide as the residual stream) that would keep as much as the pruned model
keeps. There the stream waits instead: the weights of gate and up are kept, and each batch is moved on when down's statistics
need it, and at once beyond them. So no more of the wide inputs is there than those of one batch, and nothing is computed twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.pipelines.cache import IntermediatesCache

from rac_modifier.freed_memory import return_freed_memory
from rac_modifier.llmcompressor.group_shape import GroupShape, saves_by_waiting
from rac_modifier.llmcompressor.stages import Stage


class DenseStream:
    """The dense model's inputs of stage after stage, of `tokens` tokens, beginning with those in `cache`."""

    def __init__(self, model: torch.nn.Module, cache: IntermediatesCache, tokens: int):
        self.cache = IntermediatesCache(
            [dict(batch) for batch in cache.batch_intermediates], cache.offload_device
        )
        self._model, self._tokens = model, tokens
        self._late: Stage | None = None  # what the stream waits before
        self._weights: dict[torch.nn.Linear, torch.Tensor] = {}

    def waits(self, stage: Stage, after: Stage) -> bool:
        """Whether the stream does not run `stage` until `after` takes its statistics."""
        if (
            stage.experts is not None
            or after.experts is not None
            or not (stage.modules and after.modules)
        ):
            return False
        if any(type(module).forward is not torch.nn.Linear.forward for module in stage.modules):
            return False
        here, then = (
            GroupShape.of(dict.fromkeys(each.modules, ""), each.modules) for each in (stage, after)
        )
        return saves_by_waiting(here, then, self._tokens)

    def run(self, stage: Stage, batch: int) -> None:
        """Move a batch on through a stage whose modules are dense."""
        stage.run(self._model, self.cache, batch)
        return_freed_memory()  # its blocks lie between those that stay

    def forget(self, batch: int) -> None:
        """Drop a batch that is needed no longer."""
        self.cache.delete(batch)

    def leave(self, stage: Stage) -> None:
        """Keep the weights of a stage that is pruned now, to run it with them later."""
        self._late = stage
        self._weights = {module: module.weight.detach().clone() for module in stage.modules}  # type: ignore[misc, operator]

    @contextlib.contextmanager
    def catching_up(self) -> Iterator[None]:
        """While it is in place, `catch_up` runs what was left; the weights that were kept for that are gone after it."""
        try:
            yield
        finally:
            self._late, self._weights = None, {}

    def catch_up(self, batch: int) -> None:
        """Move a batch on through the stage that was left, if one was."""
        if self._late is not None:
            with _with_weights(self._weights):
                self.run(self._late, batch)


@contextlib.contextmanager
def _with_weights(weights: dict[torch.nn.Linear, torch.Tensor]) -> Iterator[None]:
    """Linear layers compute with these weights instead of their own."""
    with contextlib.ExitStack() as stack:
        for module, weight in weights.items():

            def forward(
                x: torch.Tensor, module: torch.nn.Linear = module, weight: torch.Tensor = weight
            ) -> torch.Tensor:
                return torch.nn.functional.linear(x, weight, module.bias)

            stack.enter_context(patch_attr(module, "forward", forward))
        yield
