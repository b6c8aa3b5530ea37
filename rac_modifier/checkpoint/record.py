"""The name of the run record, and the versions that a run was made with."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from rac_modifier.files import read_json as read_json
from rac_modifier.files import write_json_atomic as write_json_atomic
from rac_modifier.files import write_text_atomic as write_text_atomic

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
    """Versions by package (None where not installed), Python, platform and the number of CPUs; nothing is imported."""
    versions: dict[str, str | int | None] = {}
    for key, distribution in _PACKAGES:
        try:
            versions[key] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            versions[key] = None
    if versions["rac_modifier"] is None:  # run from a source tree
        from rac_modifier import __version__

        versions["rac_modifier"] = __version__
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }
