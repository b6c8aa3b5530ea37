"""What each preset sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Preset = Literal["quality", "fast", "paper"]
Order = Literal["auto", "group", "layer"]

PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"solver": "alps", "refit": False, "reconstruct": "dense", "order": "auto"},
    "fast": {"solver": "sparsegpt", "refit": True, "reconstruct": "dense", "order": "auto"},
    "paper": {"solver": "sparsegpt", "refit": False, "reconstruct": "pruned", "order": "layer"},
}


def with_preset(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a recipe entry, and those of its preset that the entry does not set itself.

    An unknown preset adds nothing: the schema refuses it.
    """
    return {**PRESETS.get(str(settings.get("preset", "quality")), {}), **settings}
