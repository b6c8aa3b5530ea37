"""The name of the run record, and the versions that a run was made with."""

from __future__ import annotations

import os
import platform
from importlib import metadata

RUN_RECORD_NAME = "rac_run.json"
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
