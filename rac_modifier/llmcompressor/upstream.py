"""Hold what this package replaces or reads privately in llm-compressor and compressed-tensors.

A function per entry. Its docstring says why, and names the contract test that an upgrade breaks
first, and what makes the entry unnecessary. Entries of transformers are in `checkpoint/`; a test
finds all of them (`tests/contracts/test_register.py`).
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from compressed_tensors.distributed import get_source_rank
from compressed_tensors.offload.cache.dist_cpu import DistributedCPUCache
from compressed_tensors.offload.utils import to_tensor
from compressed_tensors.registry.registry import _REGISTRY
from compressed_tensors.utils import patch_attr
from llmcompressor.core import Event, State
from llmcompressor.entrypoints.oneshot import Oneshot
from llmcompressor.modeling.moe import context
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.pipelines.sequential.pipeline import SequentialPipeline
from torch import Tensor
from torch.fx import _symbolic_trace
from transformers import PreTrainedModel

from rac_modifier.distributed.torchrun import present_processes


def calling_oneshot() -> Oneshot | None:
    """Return the `Oneshot` among the callers, or None: a modifier does not get its arguments.

    Contract: test_seam_oneshot_holds_its_arguments
    Until: a modifier's `state` has the output folder, the tokenizer and the dataset's arguments.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Oneshot):
            return caller
        frame = frame.f_back
    return None


def use_sequential_pipeline(make: Callable[[], SequentialPipeline]) -> None:
    """Register what makes the pipeline "sequential": a modifier cannot bring a calibration set.

    Contract: test_seam_calibration_pipeline_registry_is_what_from_modifiers_loads
    Until: a registered value can be replaced, or a modifier names its pipeline.
    """
    _REGISTRY[CalibrationPipeline]["sequential"] = make


@contextlib.contextmanager
def contained_tracing(model: PreTrainedModel) -> Iterator[None]:
    """Undo what tracing leaves: functions wrapped in `torch.fx`, which hold the model for ever.

    A tracer that fails also leaves functions of torch and of the model's cache classes replaced.
    Contract: test_seam_tracing_leaves_wrapped_functions
    Until: `trace_subgraphs` takes its wrapped functions away.
    """
    wrapped = _symbolic_trace._wrapped_fns_to_patch
    before = set(wrapped)
    forwards = (module.forward for module in model.modules())
    spaces = (vars(torch), *(getattr(forward, "__globals__", {}) for forward in forwards))
    values = [(space, dict(space)) for space in {id(s): s for s in spaces}.values()]
    try:
        yield
    except BaseException:
        for space, old in values:
            space.update(old)
        raise
    finally:
        for key in wrapped.keys() - before:
            del wrapped[key]


def without_pinning() -> AbstractContextManager[Any]:
    """Keep AWQModifier from pinning memory where torch refuses to: without an accelerator.

    Contract: test_seam_a_cache_pins_memory_without_an_accelerator_too
    Until: `IntermediatesCache.pin_memory` asks for an accelerator.
    """
    if torch.accelerator.is_available():
        return contextlib.nullcontext()
    pinning: AbstractContextManager[Any] = patch_attr(
        IntermediatesCache, "pin_memory", lambda *_, **__: None
    )
    return pinning


def only_routed_tokens() -> AbstractContextManager[None]:
    """Run each expert on its own tokens, against `oneshot`'s moe_calibrate_all_experts=True.

    Contract: test_seam_the_switch_is_a_variable_of_its_module
    Until: `moe_calibration_context` takes a value.
    """
    return patch_attr(context, "_CALIBRATE_ALL_EXPERTS", False)


def recorded_experts(record: dict[str, dict[str, Any]]) -> AbstractContextManager[None]:
    """Fill `record` while REAP calibrates: by layer the `kept` experts, and each one's `saliency`.

    REAPPruningModifier forgets a layer's values when it removes the layer's experts.
    Contract: test_seam_reap_holds_saliency_until_it_removes_a_layers_experts
    Until: REAPPruningModifier reports what it measured and kept.
    """
    remove = REAPPruningModifier.on_sequential_epoch_end

    def record_and_remove(modifier: Any, state: State, event: Event, **kwargs: Any) -> None:
        measured = {
            layer: [float(f"{value:.4g}") for value in tracker.mean_saliency]
            for layer, tracker in modifier._saliency_trackers.items()
            if tracker.total_count
        }
        remove(modifier, state, event, **kwargs)
        for name, values in (("kept", modifier._retained_experts), ("saliency", measured)):
            record.setdefault(name, {}).update(values)

    recording: AbstractContextManager[None] = patch_attr(
        REAPPruningModifier, "on_sequential_epoch_end", record_and_remove
    )
    return recording


def share_on_each_machine() -> None:
    """Let compressed-tensors keep a copy of offloaded weights on each machine of a run.

    With several processes it keeps one copy, in the memory of one machine.
    Contract: test_seam_the_cache_of_several_processes_offloads_one_tensor
    Until: compressed-tensors offloads for several machines.
    """
    DistributedCPUCache.offload = _offload


@torch.no_grad()
def _offload(cache: DistributedCPUCache, tensor: Tensor | None) -> Tensor | None:
    """Return the source rank's tensor, in memory that the processes of a machine share."""
    if tensor is None:
        return None
    processes = present_processes()
    values = processes.send(tensor, get_source_rank()).cpu().contiguous()
    shape = values.shape
    if values.untyped_storage().nbytes() > values.nbytes:  # a part of merged experts
        values = values.clone()
    place = None
    if processes.rank == processes.machine:
        manager, name, size = values.share_memory_().untyped_storage()._share_filename_cpu_()
        place = [manager.decode(), name.decode(), size]
    manager, name, size = processes.from_all(place)[processes.machine]
    if processes.rank != processes.machine:
        storage = torch.UntypedStorage._new_shared_filename_cpu(
            manager.encode(), name.encode(), size
        )
        values = torch.empty(0, dtype=values.dtype).set_(storage)
    processes.wait()  # the first does not free it before the others have it
    return to_tensor(values.view(shape), tensor)
