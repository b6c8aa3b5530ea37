"""Run a plan: per stage restore or collect, solve and store, then advance the activations.

Upstream takes all Hessians of a decoder layer before it prunes any of its modules, so o_proj and
the MLP are calibrated on inputs that they do not have in the pruned model. By group, each module
runs once, after it was pruned.
"""

import contextlib
from collections.abc import Sequence

import torch
from compressed_tensors.offload import disable_offloading
from llmcompressor.core import LifecycleCallbacks
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.utils.helpers import DisableQuantization, calibration_forward_context
from torch import Tensor

from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.llmcompressor.expert_stage import prune_experts, read_router
from rac_modifier.llmcompressor.plan import Stage
from rac_modifier.llmcompressor.run import Run
from rac_modifier.llmcompressor.statistics import (
    Collector,
    DenseStream,
    InputGroup,
    NoStream,
    check_same_groups,
)
from rac_modifier.llmcompressor.upstream import only_routed_tokens
from rac_modifier.runtime.cpu_tuning import FasterLinears, onednn_is_faster, return_freed_memory


def run_stages(
    model: torch.nn.Module,
    loader: CalibrationLoader,
    stages: Sequence[Stage],
    run: Run,
    onload: torch.device,
    offload: torch.device,
) -> None:
    """Prune each stage on its inputs in the pruned model, then run it."""
    by_group = run.plan["order"] == "group"
    gains = onednn_is_faster(torch.device("cpu"))  # else the mode only costs each call some time
    LifecycleCallbacks.calibration_start()
    with (
        calibration_forward_context(model),
        DisableQuantization(model),
        FasterLinears() if gains else contextlib.nullcontext(),
        HooksMixin.disable_hooks(),
        only_routed_tokens() if by_group else contextlib.nullcontext(),
    ):
        cache = IntermediatesCache.from_dataloader(loader, onload, offload)
        dense = NoStream()
        for stage, after in zip(stages, [*stages[1:], None], strict=True):
            with disable_offloading():
                return_freed_memory()
                if stage.modules and by_group and run.dense_target and dense.cache is None:
                    dense = DenseStream(model, cache, loader)
                dense.enter(stage, after)
                if not stage.modules:
                    pass  # as before the first group
                elif stage.experts is None and run.has_pruned(stage.modules):  # experts are counted
                    dense.advance_all(stage)
                    run.restore(stage.modules)
                elif stage.experts is not None:
                    batches = read_router(stage, cache, dense.cache, loader)
                    dense.advance_all(stage)
                    prune_experts(stage.experts, batches, run, onload)
                elif by_group:
                    group = _collect(stage, cache, dense, loader, run)
                    dense.leave(stage)
                    run.prune([group])
                else:
                    run.prune(_collect_layer(stage, model, cache, loader, run))
                if after is not None:
                    return_freed_memory()
                    for batch in range(len(loader)):
                        stage.run(model, cache, batch)
        LifecycleCallbacks.calibration_end()


def _collect(
    stage: Stage, cache: IntermediatesCache, dense: NoStream, loader: CalibrationLoader, run: Run
) -> InputGroup:
    """Collect what the modules of a stage by group read, and advance the dense stream."""
    group = None
    for batch, weights in enumerate(loader.token_weights):
        x, x_dense = stage.read(cache, batch), dense.inputs(stage, batch)
        group = group or InputGroup.of(
            stage.modules, x.device, run.processes, dense_target=x_dense is not None
        )
        group.statistics.add(x, weights, x_dense)
        del x, x_dense  # before the batch is advanced
        group.statistics.end_shards(loader.shards_ended[batch])
        dense.advance(stage, batch)
    assert group is not None, "a loader has at least one batch"
    return group


def _collect_layer(
    stage: Stage,
    model: torch.nn.Module,
    cache: IntermediatesCache,
    loader: CalibrationLoader,
    run: Run,
) -> list[InputGroup]:
    """Collect the groups of a stage by layer in one pass (RacError: ranks have other groups)."""
    collector, batch = Collector(run.names, run.processes), 0

    def observe(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        collector.observe(module, args[0], loader.token_weights[batch], first=batch == 0)

    hooks = [module.register_forward_pre_hook(observe) for module in stage.modules]
    try:
        for batch, count in enumerate(loader.shards_ended):
            stage.run(model, cache, batch, keep=True)
            for _ in range(count):
                check_same_groups(collector.groups, run.names, run.processes)
                for group in collector.groups:
                    group.statistics.end_shards(1)
            collector.inputs.clear()
            return_freed_memory()  # blocks of the batch lie between the sums, which stay
    finally:
        for hook in hooks:
            hook.remove()
    return collector.groups
