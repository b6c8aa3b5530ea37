"""Record what llm-compressor's REAPPruningModifier measures, and which experts it keeps."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from compressed_tensors.utils import patch_attr
from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier


def recorded_saliency(saliency: dict[str, list[float]]) -> AbstractContextManager[None]:
    """Fill `saliency` with a value per expert, by layer, while REAP calibrates.

    REAPPruningModifier forgets a layer's values when it removes the layer's experts.
    """
    remove = REAPPruningModifier.on_sequential_epoch_end

    def record_and_remove(modifier: Any, state: State, event: Event, **kwargs: Any) -> None:
        for layer, tracker in modifier._saliency_trackers.items():
            if tracker.total_count:
                saliency[layer] = [float(f"{value:.4g}") for value in tracker.mean_saliency]
        remove(modifier, state, event, **kwargs)

    context: AbstractContextManager[None] = patch_attr(
        REAPPruningModifier, "on_sequential_epoch_end", record_and_remove
    )
    return context


def experts_record(
    modifiers: Iterable[Modifier], saliency: dict[str, list[float]]
) -> dict[str, Any]:
    """Return the run record's entry: by layer the numbers of the kept experts, and the saliency."""
    kept: dict[str, list[int]] = {}
    for modifier in modifiers:
        if isinstance(modifier, REAPPruningModifier):
            kept |= modifier._retained_experts
    return {"experts_removed": {"kept": kept, "saliency": saliency}} if kept else {}
