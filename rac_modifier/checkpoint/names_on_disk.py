"""The names of modules in files: transformers renames them when it saves, and back.

llm-compressor cuts merged experts into linear layers. Transformers' conversions know the merged
ones alone, so where the files have other names for the parts of an expert (Mixtral: w1, w2,
w3), they would be written under names that nothing can load.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)

_MERGED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
_SEPARATE = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj)$")
_SOURCE = re.compile(r"\.experts\.\*\.(?P<part>\w+)\.weight$")


def keep_expert_names(model: torch.nn.Module) -> None:
    """Save the linear layers of separate experts under the names of merged experts."""
    if not any(
        isinstance(m, torch.nn.Linear) and _SEPARATE.search(name)
        for name, m in model.named_modules()
    ):
        return
    conversions: list[WeightTransform] = []
    for conversion in _conversions(model):
        conversions += _renamings(conversion) or [conversion]
    model._weight_conversions = conversions  # type: ignore[assignment] # what transformers saves by


def names_on_disk(model: torch.nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the names of modules in the files of a saved model, by their names in the model."""
    back = [conversion.reverse_transform() for conversion in reversed(_conversions(model))]
    renamings = [conversion for conversion in back if isinstance(conversion, WeightRenaming)]
    saved = {
        name: rename_source_key(f"{name}.weight", renamings, [], reverse=True)[0] for name in names
    }
    return {name: on_disk.removesuffix(".weight") for name, on_disk in saved.items()}


def _conversions(model: Any) -> list[WeightTransform]:
    attached: list[WeightTransform] | None = getattr(model, "_weight_conversions", None)
    return list(
        get_model_conversion_mapping(model, add_legacy=False) if attached is None else attached
    )


def _renamings(conversion: WeightTransform) -> list[WeightRenaming]:
    """Return a renaming per part for a conversion that merges experts, [] for others."""
    if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
        return []
    merged = conversion.target_patterns[0].rpartition(".experts.")[2]
    sources = [_SOURCE.search(source) for source in conversion._original_source_patterns]
    parts = _MERGED.get(merged, ())
    if len(parts) != len(sources) or any(source is None for source in sources):
        return []
    renamings = []
    for part, source in zip(parts, sources, strict=True):
        assert source is not None
        renaming = WeightRenaming(rf"\.experts\.(\d+)\.{source['part']}\.", rf".experts.\1.{part}.")
        renaming.scope_prefix, renaming.base_model_prefix = (
            conversion.scope_prefix,
            conversion.base_model_prefix,
        )
        renamings.append(renaming)
    return renamings
