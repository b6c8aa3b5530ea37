"""Where a saved model comes from: the names of its record and card, versions, license."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from rac_modifier.checkpoint.sparsity_config import CONFIG_FILE

RUN_RECORD_NAME = "rac_run.json"
CARD_NAME = "README.md"
UNKNOWN = "unknown"
_PACKAGES = (
    ("rac_modifier", "rac-modifier"),
    ("torch", "torch"),
    ("transformers", "transformers"),
    ("safetensors", "safetensors"),
    ("compressed_tensors", "compressed-tensors"),
    ("llmcompressor", "llmcompressor"),
)


def environment() -> dict[str, str | int | None]:
    """Return versions by package (None: not installed), Python, platform and number of CPUs."""
    versions: dict[str, str | int | None] = {}
    for key, distribution in _PACKAGES:
        try:
            versions[key] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            versions[key] = None
    versions["rac_modifier"] = versions["rac_modifier"] or "run from a source tree"
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


@dataclass(frozen=True)
class License:
    """A license as in a card: `id` is the hub's ("apache-2.0"); "other" has `name` and `link`."""

    id: str = UNKNOWN
    name: str | None = None
    link: str | None = None

    def describe(self) -> str:
        """For the text of a card."""
        if self.id == UNKNOWN:
            return "unknown: see base model"
        text = f"{self.name} ({self.id})" if self.name else self.id
        return f"{text}, {self.link}" if self.link else text


def license_of(model: str | Path) -> License:
    """Return the license in a model's card, or in its config.json; no network is used."""
    card = front_matter(_text(model, CARD_NAME))
    if isinstance(card.get("license"), str):
        return License(
            card["license"], *(_optional(card, f"license_{key}") for key in ("name", "link"))
        )
    try:
        config = json.loads(_text(model, CONFIG_FILE) or "{}")
    except ValueError:  # another reader reports that
        config = {}
    license = config.get("license") if isinstance(config, dict) else None
    return License(license) if isinstance(license, str) and license else License()


def front_matter(text: str) -> dict[str, Any]:
    """Return the metadata of a card; empty where it has none, or none that can be read."""
    if not text.startswith("---"):  # where huggingface_hub would log a warning
        return {}
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):
        return {}


def _text(model: str | Path, name: str) -> str:
    path: Any = Path(model) / name
    if not Path(model).is_dir():
        try:
            path = try_to_load_from_cache(str(model), name)
        except HFValidationError:  # no name of the hub
            return ""
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return ""
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _optional(card: dict[str, Any], key: str) -> str | None:
    return str(card[key]) if card.get(key) else None
