"""Calibrate group by group: one pass over the model, in which every module runs once, after it was pruned."""

from __future__ import annotations

import contextlib
from typing import Any

import psutil
import torch
from compressed_tensors.offload import disable_offloading
from compressed_tensors.utils import align_module_device
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context
from loguru import logger
from tqdm import tqdm

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor.input_groups import InputGroup
from rac_modifier.llmcompressor.stages import Stage
from rac_modifier.pruning.hessian import Statistics


def calibrate_by_group(
    model: torch.nn.Module,
    loader: CalibrationLoader,
    stages: list[Stage],
    modifier: Any,
    onload_device: torch.device,
    offload_device: torch.device,
) -> None:
    """Prune the modules of each stage on their inputs in the pruned model, then run the stage.

    Upstream takes all Hessians of a decoder layer before it prunes any of its modules. This costs a second pass, and
    o_proj and the MLP are calibrated on inputs that they will not get in the pruned model. Activations are kept as in upstream,
    in an `IntermediatesCache`; with the dense target (`modifier.needs_dense_stream`) there are two.
    """
    _say_what_is_kept(model, loader, stages, modifier, offload_device)
    LifecycleCallbacks.calibration_start()
    with contextlib.ExitStack() as stack:
        stack.enter_context(calibration_forward_context(model))
        stack.enter_context(DisableQuantization(model))
        stack.enter_context(HooksMixin.disable_hooks())
        pruned = IntermediatesCache.from_dataloader(loader, onload_device, offload_device)
        dense = pruned
        batches = range(len(loader))
        last = max(i for i, stage in enumerate(stages) if stage.modules)
        progress = stack.enter_context(tqdm(total=(last + 1) * len(batches), desc="pruning", unit="batch"))
        for index, stage in enumerate(stages[: last + 1]):
            with disable_offloading():
                if stage.modules:
                    progress.set_postfix_str(modifier.describe_modules(stage.modules))
                    if modifier.needs_dense_stream and dense is pruned:  # nothing is pruned yet
                        dense = _copy(pruned)
                    group = None
                    for batch in batches:
                        (x,), (x_dense,) = (c.fetch(batch, [stage.reads]).values() for c in (pruned, dense))
                        group = group or _input_group(stage, x, modifier.needs_dense_stream)
                        group.statistics.add(x, modifier.weights_for(stage.modules, batch), x_dense)
                        if dense is not pruned and index < last:
                            stage.run(model, dense, batch)
                    modifier.prune_group(group)
                for batch in batches:
                    if index < last:
                        stage.run(model, pruned, batch)
                    progress.update()
        LifecycleCallbacks.calibration_end()


def _say_what_is_kept(
    model: torch.nn.Module, loader: CalibrationLoader, stages: list[Stage], modifier: Any, device: torch.device
) -> None:
    """The widest cut: what one group reads, with the residual stream beside it, for every token and each model."""
    hidden = model.get_input_embeddings().weight  # type: ignore[operator]
    widest = max(module.weight.shape[1] for stage in stages for module in stage.modules)  # type: ignore[index]
    tokens = sum(weights.numel() for weights in loader.token_weights)
    streams = 2 if modifier.needs_dense_stream else 1
    need = tokens * (widest + hidden.shape[1]) * hidden.element_size() * streams / 2**30
    message = f"about {need:.1f} GiB of activations will be kept on {device} ({tokens:,} tokens with padding)"
    free = psutil.virtual_memory().available / 2**30
    if device.type == "cpu" and need > 0.9 * free:
        logger.warning(f"{message}, and {free:.1f} GiB are free: calibrate on fewer tokens, or set preset: paper")
    else:
        logger.info(message)


def _input_group(stage: Stage, x: torch.Tensor, with_cross_moment: bool) -> InputGroup:
    with contextlib.ExitStack() as stack:
        for module in stage.modules:
            stack.enter_context(align_module_device(module))
        weights: list[torch.Tensor] = [module.weight.detach() for module in stage.modules]  # type: ignore[operator]
    return InputGroup(stage.modules, Statistics(x.shape[-1], x.device, weights if with_cross_moment else None))


def _copy(cache: IntermediatesCache) -> IntermediatesCache:
    """A second cache that holds the same tensors."""
    return IntermediatesCache([dict(batch) for batch in cache.batch_intermediates], cache.offload_device)
