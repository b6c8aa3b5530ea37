"""The loop of a pruning run: stage by stage, restore or collect, solve and store, then move the activations on.

Upstream takes all Hessians of a decoder layer before it prunes any of its modules. That costs a second pass, and calibrates
o_proj and the MLP on inputs that they will not have in the pruned model. By group, each module runs once, after it was pruned.
"""

from __future__ import annotations

import contextlib

import torch
from compressed_tensors.offload import disable_offloading
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor.experts import only_routed_tokens
from rac_modifier.llmcompressor.plan import Plan
from rac_modifier.llmcompressor.prune_experts import prune_experts, read_router
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.statistics import collect, collect_layer
from rac_modifier.llmcompressor.streams import DenseStream, NoStream, Stream
from rac_modifier.platform import FasterLinears, return_freed_memory


def run_plan(
    model: torch.nn.Module,
    loader: CalibrationLoader,
    plan: Plan,
    run: Run,
    onload: torch.device,
    offload: torch.device,
    recomputed: int = 0,
) -> None:
    """Prune the modules of each stage on their inputs in the pruned model, then run the stage.

    Activations are kept on `offload`; inputs of `recomputed` columns are computed twice instead (streams.py).
    """
    LifecycleCallbacks.calibration_start()
    with contextlib.ExitStack() as stack:
        stack.enter_context(calibration_forward_context(model))
        stack.enter_context(DisableQuantization(model))
        stack.enter_context(FasterLinears())
        stack.enter_context(HooksMixin.disable_hooks())
        stack.enter_context(
            only_routed_tokens() if plan.order == "group" else contextlib.nullcontext()
        )
        cache = IntermediatesCache.from_dataloader(loader, onload, offload)
        _run_stages(model, loader, plan, run, cache, onload, recomputed)
        LifecycleCallbacks.calibration_end()


def _run_stages(
    model: torch.nn.Module,
    loader: CalibrationLoader,
    plan: Plan,
    run: Run,
    cache: IntermediatesCache,
    device: torch.device,
    recomputed: int,
) -> None:
    stages, by_group = plan.stages, plan.order == "group"
    pruned, dense = Stream(model, cache, recomputed), NoStream()
    for stage, after in zip(stages, [*stages[1:], None], strict=True):
        with disable_offloading():
            if stage.modules:
                return_freed_memory()
                if by_group and run.dense_target and not dense.carries:
                    tokens = sum(weights.numel() for weights in loader.token_weights)
                    dense = DenseStream(model, cache, tokens)
                dense.enter(stage, after)
                if run.has_pruned(stage.modules):
                    dense.advance_all(stage)
                    run.restore(stage.modules)
                elif stage.experts is not None:
                    batches = read_router(stage, cache, dense.cache, loader)
                    dense.advance_all(stage)
                    prune_experts(stage.experts, batches, run, device)
                    del batches  # of both models, as large as a stream of activations each
                elif by_group:
                    group = collect(stage, pruned, dense, loader, run.processes)
                    dense.leave(stage)
                    run.prune([group])
                else:
                    run.prune(collect_layer(stage, model, cache, loader, run.names, run.processes))
            if after is not None:
                pruned.advance(stage, after)
