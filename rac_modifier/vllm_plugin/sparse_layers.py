"""Which layers of a checkpoint are stored sparse, from its config, and how their names map to vLLM's. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rac_modifier.checkpoint.formats import PARTS
from rac_modifier.checkpoint.quantization_config import PACK_QUANTIZED
from rac_modifier.checkpoint.sparsity_config import (
    METHOD,
    RAC_KEY,
    RAC_METHOD,
    SparsityConfig,
    SparsityRecord,
)
from rac_modifier.errors import RacError

DRAFT = "draft_model"  # vllm.v1.spec_decode.draft_model gives it to `get_model` as the prefix of all layers


@dataclass(frozen=True)
class SparseLayers:
    """Which linear modules are stored sparse, and how.

    `format` is one of `checkpoint.formats.PARTS`, or None where the weights are stored dense. `targets` and `ignore` are
    module names, "re:" patterns or, as in compressed-tensors, "Linear" for all. `int8_activations`: names of modules whose inputs
    may be rounded to 8 bits.
    """

    format: str | None
    targets: tuple[str, ...]
    ignore: tuple[str, ...] = ()
    int8_activations: tuple[str, ...] = ()

    def holds(self, module: str) -> bool:
        """Whether the weight of the linear `module`, named as on disk, is stored sparse."""
        return _matches(module, self.targets) and not _matches(module, self.ignore)

    def renamed(self, rename: Mapping[str, str]) -> SparseLayers:
        """With module names replaced; names that are not in `rename` stay."""
        lists = (self.targets, self.ignore, self.int8_activations)
        targets, ignore, int8 = (tuple(rename.get(entry, entry) for entry in old) for old in lists)
        return replace(self, targets=targets, ignore=ignore, int8_activations=int8)

    @property
    def names(self) -> list[str]:
        """The entries that are module names, neither patterns nor classes."""
        entries = (*self.targets, *self.ignore, *self.int8_activations)
        return [entry for entry in entries if "." in entry and not entry.startswith("re:")]


def is_packed(quantization: object) -> bool:
    """Whether a `quantization_config` is that of a packed sparse checkpoint, by its method and format alone.

    Never raises, whatever the value is: vLLM calls this for every quantized model. `quant_method` is "rac"; older files have
    "compressed-tensors", and of these, formats that cannot be read here are left to vLLM. What else is in the entry is checked
    by `parse_packed`.
    """
    if not isinstance(quantization, Mapping):
        return False
    method = quantization.get("quant_method")
    if method == RAC_METHOD:
        return True
    if method != METHOD:
        return False
    sparsity = quantization.get("sparsity_config")
    format = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    return isinstance(format, str) and format in PARTS


def parse_packed(quantization: Mapping[str, Any]) -> SparseLayers:
    """The sparse layers of the `quantization_config` of a packed sparse checkpoint.

    Raises:
        RacError: it has no sparsity_config, or a malformed one.
    """
    sparsity = SparsityConfig.of(quantization)
    if sparsity is None:
        raise RacError(
            "config.json: quantization_config has no sparsity_config; restore the config.json that was saved with the checkpoint"
        )
    return SparseLayers(sparsity.format, sparsity.targets, sparsity.ignore)


def parse_dense_stored(record: object) -> SparseLayers:
    """The sparse layers of a `rac_sparsity` entry: weights pruned, but stored dense.

    Raises:
        RacError: a malformed entry, or one without a pruned module.
    """
    modules = SparsityRecord.of({RAC_KEY: record}).modules
    if not modules:
        raise RacError(
            "config.json: rac_sparsity names no pruned module, so there is nothing to serve sparse; leave out "
            "--quantization rac, or save the model with rac-modifier"
        )
    return SparseLayers(None, tuple(modules))


def is_quantized(quantization: Mapping[str, Any]) -> bool:
    """Whether the packed weights are quantized too."""
    return bool(quantization.get("config_groups"))


def is_in_words(quantization: Mapping[str, Any]) -> bool:
    """Whether stock loaders expect some of the quantized weights as several values per int32."""
    groups = quantization.get("config_groups")
    formats = (
        [group.get("format") for group in groups.values() if isinstance(group, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )
    return PACK_QUANTIZED in [quantization.get("format"), *formats]


def kinds_of(quantization: Mapping[str, Any]) -> tuple[str, ...]:
    """What the kernels multiply the weights of a `quantization_config` as: "floats", "int8", "int4", one or several of them."""
    found = {
        f"int{weights.get('num_bits')}" if weights.get("type", "int") == "int" else "floats"
        for group in (quantization.get("config_groups") or {}).values()
        if isinstance(weights := group.get("weights"), Mapping)
    }
    return tuple(sorted(kind for kind in found if kind in ("int8", "int4", "floats"))) or (
        "floats",
    )


def stored_name(prefix: str) -> str:
    """A layer of the server as the checkpoint names it: the layers of a draft (speculative decoding) have a prefix of vLLM's."""
    return prefix.removeprefix(f"{DRAFT}.")


def fused_modules(prefix: str, fused: Mapping[str, list[str]]) -> list[str]:
    """The modules on disk of a layer of the server. `fused` maps a fused layer's last name to those of its shards."""
    parent, _, name = prefix.rpartition(".")
    return [f"{parent}.{shard}" if parent else shard for shard in fused.get(name) or [name]]


def _matches(module: str, entries: Iterable[str]) -> bool:
    """As in compressed-tensors: the whole name, or a pattern from its start; "Linear" is the class of every module."""
    return any(
        re.match(entry[3:], module) is not None
        if entry.startswith("re:")
        else entry in (module, "Linear")
        for entry in entries
    )
