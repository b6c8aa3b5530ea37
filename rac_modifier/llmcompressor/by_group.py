"""Calibrate group by group: one pass over the model, in which every module runs once, after it was pruned."""

from __future__ import annotations

import contextlib

import torch
from compressed_tensors.offload import disable_offloading
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.float32_products import FasterLinears
from rac_modifier.freed_memory import return_freed_memory
from rac_modifier.llmcompressor.by_expert import prune_experts, read_by_experts
from rac_modifier.llmcompressor.experts import only_routed_tokens
from rac_modifier.llmcompressor.input_groups import InputGroup, bytes_of_sums
from rac_modifier.llmcompressor.pruner import Pruner
from rac_modifier.llmcompressor.stages import Stage


def calibrate_by_group(
    model: torch.nn.Module,
    loader: CalibrationLoader,
    stages: list[Stage],
    pruner: Pruner,
    onload_device: torch.device,
    offload_device: torch.device,
) -> None:
    """Prune the modules of each stage on their inputs in the pruned model, then run the stage.

    Upstream takes all Hessians of a decoder layer before it prunes any of its modules. This costs a second pass, and
    o_proj and the MLP are calibrated on inputs that they will not get in the pruned model. Activations are kept as in upstream,
    in an `IntermediatesCache`; with the dense target (`pruner.needs_dense_stream`) there are two. The routed experts of a layer
    are a stage of their own (by_expert.py).
    """
    LifecycleCallbacks.calibration_start()
    with contextlib.ExitStack() as stack:
        stack.enter_context(calibration_forward_context(model))
        stack.enter_context(DisableQuantization(model))
        stack.enter_context(FasterLinears())
        stack.enter_context(HooksMixin.disable_hooks())
        stack.enter_context(only_routed_tokens())
        pruned = IntermediatesCache.from_dataloader(loader, onload_device, offload_device)
        dense = pruned
        batches = range(len(loader))
        last = max(i for i, stage in enumerate(stages) if stage.modules)
        for index, stage in enumerate(stages[: last + 1]):
            with disable_offloading():
                if stage.modules:
                    return_freed_memory(bytes_of_sums(stage.modules))
                    if pruner.needs_dense_stream and dense is pruned:  # until here nothing was pruned
                        dense = _copy(pruned)
                    known = pruner.was_pruned(stage.modules)  # by a run that was killed
                    routed, group = stage.experts, None
                    if routed is not None:
                        read = read_by_experts(stage, pruned, None if dense is pruned else dense, loader)
                    for batch in batches:
                        if not known and routed is None:
                            (x,), (x_dense,) = (c.fetch(batch, [stage.reads]).values() for c in (pruned, dense))
                            group = group or InputGroup.of(
                                stage.modules, x.device, with_cross_moment=pruner.needs_dense_stream
                            )
                            group.statistics.add(x, loader.token_weights[batch], x_dense)
                            group.statistics.end_lanes(loader.lanes_ended[batch], pruner.processes)
                        if dense is not pruned and index < last:
                            stage.run(model, dense, batch)
                            return_freed_memory()  # its blocks lie between those that stay
                    if routed is not None:
                        prune_experts(routed, read, pruner, onload_device)
                        del read  # of both models, as large as a stream of activations each
                    elif group is None:
                        pruner.restore(stage.modules)
                    else:
                        pruner.prune_groups([group])
                if index < last:
                    return_freed_memory()
                    for batch in batches:
                        stage.run(model, pruned, batch)
                        return_freed_memory()
        LifecycleCallbacks.calibration_end()


def _copy(cache: IntermediatesCache) -> IntermediatesCache:
    """A second cache that holds the same tensors."""
    return IntermediatesCache([dict(batch) for batch in cache.batch_intermediates], cache.offload_device)
