"""The run record of a saved model: versions, and what was recorded of it later."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rac_modifier.checkpoint.files import CONFIG_FILE
from rac_modifier.checkpoint.quantization_config import with_int8_activations
from rac_modifier.files import read_json, without_paths, write_json_atomic

RUN_RECORD_NAME = "rac_run.json"
_PACKAGES = "rac-modifier torch transformers safetensors compressed-tensors llmcompressor"


def environment() -> dict[str, str | int | None]:
    """Return versions by package (None: not installed), Python, platform and number of CPUs."""
    installed = {dist.name: dist.version for dist in metadata.distributions()}
    versions = {name.replace("-", "_"): installed.get(name) for name in _PACKAGES.split()}
    return {
        **versions,
        "rac_modifier": versions["rac_modifier"] or "run from a source tree",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
    }


def record_activations(folder: Path, modules: Sequence[str], entry: Mapping[str, Any]) -> None:
    """Write the modules with activations in 8 bits into config.json and the run record.

    A model of another tool has no run record, and gets none.
    """
    if (folder / RUN_RECORD_NAME).is_file():
        record = read_json(folder / RUN_RECORD_NAME)
        record["activations"] = without_paths(dict(entry))
        write_json_atomic(folder / RUN_RECORD_NAME, record)
    config = with_int8_activations(read_json(folder / CONFIG_FILE), modules)
    write_json_atomic(folder / CONFIG_FILE, config)
