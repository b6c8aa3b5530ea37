"""Calibrate layer by layer, as upstream does, without the work whose result is not used."""

from __future__ import annotations

import contextlib
import gc

import torch
from compressed_tensors.offload import disable_offloading
from llmcompressor.args import DatasetArguments
from llmcompressor.core import CompressionSession, LifecycleCallbacks
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.sequential.helpers import trace_subgraphs
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from transformers import PreTrainedModel

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.float32_products import FasterLinears
from rac_modifier.freed_memory import return_freed_memory
from rac_modifier.llmcompressor.large_results import BeforeLargeResults
from rac_modifier.llmcompressor.pruner import Pruner
from rac_modifier.llmcompressor.stages import Stage, use_own_configs
from rac_modifier.model_tools import StopForward


def calibrate_by_layer(
    model: PreTrainedModel,
    loader: CalibrationLoader,
    pruner: Pruner,
    dataset_args: DatasetArguments,
    session: CompressionSession,
    onload_device: torch.device,
) -> None:
    """Take all Hessians of a decoder layer from one pass, prune it, and run it a second time for the next layer.

    A subgraph's first pass ends at its last calibrated module (whose output the Hessians do not need), the last calibrated
    subgraph is not run a second time, and what comes after it is not run at all.
    """
    subgraphs = trace_subgraphs(
        model,
        next(iter(loader)),
        infer_sequential_targets(model, dataset_args.sequential_targets),  # type: ignore[arg-type]
        dataset_args.tracing_ignore,
        dataset_args.sequential_targets_per_subgraph,
    )
    configs = use_own_configs(model, subgraphs)
    stages = [Stage([], None, [subgraph], configs) for subgraph in subgraphs]
    LifecycleCallbacks.calibration_start()
    wanted = set(pruner.calibrated_modules())
    submodules = [subgraph.submodules(model) for subgraph in subgraphs]
    last = max(
        (i for i, modules in enumerate(submodules) if wanted.intersection(modules)), default=-1
    )

    with contextlib.ExitStack() as stack:
        stack.enter_context(calibration_forward_context(model))
        stack.enter_context(DisableQuantization(model))
        stack.enter_context(FasterLinears())
        stack.enter_context(BeforeLargeResults())
        cache = IntermediatesCache.from_dataloader(
            loader, onload_device, torch.device(dataset_args.sequential_offload_device)
        )
        for index, stage in enumerate(stages[: last + 1]):
            with disable_offloading():
                here = [module for module in submodules[index] if module in wanted]
                return_freed_memory()
                if pruner.was_pruned(here):  # by a run that was killed
                    pruner.restore(here)
                elif here:
                    pruner.on_subgraph_start(submodules[index])
                    for batch in range(len(loader)):
                        session.state.current_batch_idx = batch
                        with contextlib.suppress(StopForward):
                            stage.look(model, cache, batch)
                        pruner.end_lanes(loader.lanes_ended[batch])
                        # upstream's frames refer to the exception and it to them; that cycle would keep this batch's activations
                        gc.collect(1)
                        return_freed_memory()  # blocks of the batch lie between the sums, which stay
                    LifecycleCallbacks.sequential_epoch_end(submodules[index])
                if index < last:
                    return_freed_memory()
                    with HooksMixin.disable_hooks():
                        for batch in range(len(loader)):
                            stage.run(model, cache, batch)
                            return_freed_memory()
        LifecycleCallbacks.calibration_end()
