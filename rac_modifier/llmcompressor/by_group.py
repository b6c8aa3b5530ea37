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
from rac_modifier.llmcompressor.dense_stream import DenseStream
from rac_modifier.llmcompressor.experts import only_routed_tokens
from rac_modifier.llmcompressor.input_groups import InputGroup
from rac_modifier.llmcompressor.large_results import BeforeLargeResults
from rac_modifier.llmcompressor.pruned_stream import PrunedStream, read
from rac_modifier.llmcompressor.pruner import Pruner
from rac_modifier.llmcompressor.stages import Stage


def calibrate_by_group(
    model: torch.nn.Module,
    loader: CalibrationLoader,
    stages: list[Stage],
    pruner: Pruner,
    onload_device: torch.device,
    offload_device: torch.device,
    *,
    twice_before: int = 0,
) -> None:
    """Prune the modules of each stage on their inputs in the pruned model, then run the stage.

    Upstream takes all Hessians of a decoder layer before it prunes any of its modules. This costs a second pass, and
    o_proj and the MLP are calibrated on inputs that they will not get in the pruned model. Activations are kept as in upstream,
    in an `IntermediatesCache` (pruned_stream.py; `twice_before`: with less kept); with the dense
    target (`pruner.needs_dense_stream`) there are two (dense_stream.py). The routed experts of a layer are a stage of their own
    (by_expert.py).
    """
    LifecycleCallbacks.calibration_start()
    with contextlib.ExitStack() as stack:
        stack.enter_context(calibration_forward_context(model))
        stack.enter_context(DisableQuantization(model))
        stack.enter_context(FasterLinears())
        stack.enter_context(BeforeLargeResults())
        stack.enter_context(HooksMixin.disable_hooks())
        stack.enter_context(only_routed_tokens())
        cache = IntermediatesCache.from_dataloader(loader, onload_device, offload_device)
        pruned = PrunedStream(model, cache, twice_before=twice_before)
        dense: DenseStream | None = (
            None  # until something was pruned, both models' activations are the same
        )
        batches, tokens = (
            range(len(loader)),
            sum(weights.numel() for weights in loader.token_weights),
        )
        last = max(i for i, stage in enumerate(stages) if stage.modules)
        for index, stage in enumerate(stages[: last + 1]):
            with disable_offloading():
                if stage.modules:
                    return_freed_memory()
                    if pruner.needs_dense_stream and dense is None:
                        dense = DenseStream(model, cache, tokens)
                    known = pruner.was_pruned(stage.modules)  # by a run that was killed
                    routed, group = stage.experts, None
                    if routed is not None:
                        of_experts = read_by_experts(
                            stage, cache, None if dense is None else dense.cache, loader
                        )
                    waits = (
                        dense is not None and index < last and dense.waits(stage, stages[index + 1])
                    )
                    with dense.catching_up() if dense is not None else contextlib.nullcontext():
                        for batch in batches:
                            if dense is not None:
                                dense.catch_up(batch)
                            if not known and routed is None:
                                inputs = [pruned.inputs(stage, batch)]
                                if dense is not None:
                                    inputs.append(read(stage, dense.cache, batch))
                                group = group or InputGroup.of(
                                    stage.modules,
                                    inputs[0].device,
                                    with_cross_moment=pruner.needs_dense_stream,
                                )
                                group.statistics.add(
                                    inputs[0], loader.token_weights[batch], inputs[-1]
                                )
                                del inputs  # the caches need not keep them any longer
                                group.statistics.end_lanes(
                                    loader.lanes_ended[batch], pruner.processes
                                )
                            if dense is not None and index == last:
                                dense.forget(batch)
                            elif dense is not None and not waits:
                                dense.run(stage, batch)
                    if dense is not None and waits:
                        dense.leave(stage)
                    if routed is not None:
                        prune_experts(routed, of_experts, pruner, onload_device)
                        del of_experts  # of both models, as large as a stream of activations each
                    elif group is None:
                        pruner.restore(stage.modules)
                    else:
                        pruner.prune_groups([group])
                if index < last:
                    pruned.run(stage, stages[index + 1])
        LifecycleCallbacks.calibration_end()
