"""What the presets stand for."""

from __future__ import annotations

from typing import Any, Literal

Preset = Literal["quality", "fast", "paper"]
Order = Literal["auto", "group", "layer"]

PRESETS: dict[str, dict[str, Any]] = {
    "quality": {"solver": "alps", "refit": False, "reconstruct": "dense", "order": "auto"},
    "fast": {"solver": "sparsegpt", "refit": True, "reconstruct": "dense", "order": "auto"},
    "paper": {"solver": "sparsegpt", "refit": False, "reconstruct": "pruned", "order": "layer"},
}


def with_preset(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe entry, with the preset's where it sets none; an unknown preset is left to the schema."""
    return {**PRESETS.get(str(settings.get("preset", "quality")), {}), **settings}
