"""What config.json says about sparsity: pure functions on the parsed file.

`quantization_config.sparsity_config` is compressed-tensors' place and means packed weights; stock vLLM from 0.19 on
refuses it by a clear error. `rac_sparsity` is our own key, which nothing else reads: it names every pruned module and
its mask structure, for packed and for dense-stored weights.
"""

from __future__ import annotations

from typing import Any

from rac_modifier.checkpoint.formats import FORMAT_24, PARTS, UNSTRUCTURED
from rac_modifier.errors import RacError

CONFIG_FILE = "config.json"
RAC_KEY = "rac_sparsity"


def packed_format(config: dict[str, Any]) -> str | None:
    """The format that the weights are packed in, None where they are dense.

    Raises:
        RacError: a malformed sparsity_config, or a format that this package does not know.
    """
    quantization = config.get("quantization_config")
    sparsity = quantization.get("sparsity_config") if isinstance(quantization, dict) else None
    if not sparsity:
        return None
    if not isinstance(sparsity, dict):
        raise RacError(f"{CONFIG_FILE}: sparsity_config is {sparsity!r}, not an object; save the model again")
    format = sparsity.get("format")
    if format == "dense":
        return None
    if not isinstance(format, str) or format not in PARTS:
        raise RacError(f"{CONFIG_FILE}: sparsity_config has the format {format!r}; only {', '.join(PARTS)} can be read")
    return format


def ignored_modules(config: dict[str, Any]) -> set[str]:
    """The modules that sparsity_config lists as left dense."""
    quantization = config.get("quantization_config")
    sparsity = quantization.get("sparsity_config") if isinstance(quantization, dict) else None
    ignore = sparsity.get("ignore") if isinstance(sparsity, dict) else None
    return {name for name in ignore if isinstance(name, str)} if isinstance(ignore, list) else set()


def recorded_structures(config: dict[str, Any]) -> dict[str, str]:
    """Mask structure by module as `rac_sparsity` has it; empty for a model that this package did not prune."""
    record = config.get(RAC_KEY)
    modules = record.get("modules") if isinstance(record, dict) else None
    if not isinstance(modules, dict):
        return {}
    return {name: value for name, value in modules.items() if isinstance(name, str) and isinstance(value, str)}


def with_packed(
    config: dict[str, Any], format: str, structures: dict[str, str], global_sparsity: float, ignore: list[str]
) -> dict[str, Any]:
    """A copy of the config for packed weights; what quantisation wrote there is kept.

    `global_sparsity` is the share of zeros in the packed modules.
    """
    before = config.get("quantization_config") or {"format": "dense"}
    if not isinstance(before, dict) or before.get("quant_method", "compressed-tensors") != "compressed-tensors":
        method = before.get("quant_method") if isinstance(before, dict) else before
        raise RacError(f"{CONFIG_FILE}: quantised by {method!r}; only compressed-tensors checkpoints can be packed")
    sparsity = {
        "format": format,
        "sparsity_structure": "2:4" if format == FORMAT_24 else UNSTRUCTURED,
        "global_sparsity": round(global_sparsity, 6),
        "targets": ["Linear"],
        "ignore": sorted(ignore),
    }
    quantization = {**before, "quant_method": "compressed-tensors", "sparsity_config": sparsity}
    return {**config, "quantization_config": quantization, RAC_KEY: {"storage": "packed", "modules": structures}}


def with_dense_mark(config: dict[str, Any], structures: dict[str, str]) -> dict[str, Any]:
    """A copy of the config for sparse weights that are stored dense, which stock transformers and vLLM load."""
    marked = {**config, RAC_KEY: {"storage": "dense", "modules": structures}}
    if isinstance(config.get("quantization_config"), dict):
        kept = without_sparsity(config["quantization_config"])
        marked.pop("quantization_config")
        if kept is not None:
            marked["quantization_config"] = kept
    return marked


def without_sparsity(quantization: dict[str, Any]) -> dict[str, Any] | None:
    """A quantization_config as it is for dense weights; None where only sparsity was in it."""
    kept = {key: value for key, value in quantization.items() if key != "sparsity_config"}
    sparse_only = kept.get("quant_method") == "compressed-tensors" and not (
        kept.get("config_groups") or kept.get("kv_cache_scheme") or kept.get("transform_config")
    )
    return None if sparse_only else kept
