"""Calibrate group by group: one pass over the model, in which every module runs once, after it was pruned."""

from __future__ import annotations

import contextlib

import torch
from compressed_tensors.offload import disable_offloading
from compressed_tensors.utils import align_module_device
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor.input_groups import InputGroup
from rac_modifier.llmcompressor.pruner import Pruner
from rac_modifier.llmcompressor.stages import Stage
from rac_modifier.pruning.hessian import Statistics


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
    in an `IntermediatesCache`; with the dense target (`pruner.needs_dense_stream`) there are two.
    """
    LifecycleCallbacks.calibration_start()
    with contextlib.ExitStack() as stack:
        stack.enter_context(calibration_forward_context(model))
        stack.enter_context(DisableQuantization(model))
        stack.enter_context(HooksMixin.disable_hooks())
        pruned = IntermediatesCache.from_dataloader(loader, onload_device, offload_device)
        dense = pruned
        batches = range(len(loader))
        last = max(i for i, stage in enumerate(stages) if stage.modules)
        for index, stage in enumerate(stages[: last + 1]):
            with disable_offloading():
                if stage.modules:
                    if pruner.needs_dense_stream and dense is pruned:  # until here nothing was pruned
                        dense = _copy(pruned)
                    known = pruner.was_pruned(stage.modules)  # by a run that was killed
                    group: InputGroup | None = None
                    for batch in batches:
                        if not known:
                            (x,), (x_dense,) = (c.fetch(batch, [stage.reads]).values() for c in (pruned, dense))
                            group = group or _input_group(stage, x, pruner.needs_dense_stream)
                            group.statistics.add(x, loader.token_weights[batch], x_dense)
                        if dense is not pruned and index < last:
                            stage.run(model, dense, batch)
                    if group is None:
                        pruner.restore(stage.modules)
                    else:
                        pruner.prune_group(group)
                if index < last:
                    for batch in batches:
                        stage.run(model, pruned, batch)
        LifecycleCallbacks.calibration_end()


def _input_group(stage: Stage, x: torch.Tensor, with_cross_moment: bool) -> InputGroup:
    with contextlib.ExitStack() as stack:
        for module in stage.modules:
            stack.enter_context(align_module_device(module))
        weights: list[torch.Tensor] = [module.weight.detach() for module in stage.modules]  # type: ignore[operator]
    return InputGroup(stage.modules, Statistics(x.shape[-1], x.device, weights if with_cross_moment else None))


def _copy(cache: IntermediatesCache) -> IntermediatesCache:
    """A second cache that holds the same tensors."""
    return IntermediatesCache([dict(batch) for batch in cache.batch_intermediates], cache.offload_device)
