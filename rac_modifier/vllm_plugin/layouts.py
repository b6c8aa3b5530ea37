"""How a checkpoint stores its layers: a layout gives a layer's reader, or why there is none.

Modules that need vLLM's layers are imported in functions: at registration vLLM has not loaded them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from rac_modifier.checkpoint.dense_codes import OF_VOCABULARY
from rac_modifier.checkpoint.formats import PARTS
from rac_modifier.checkpoint.quantization_config import METHOD as COMPRESSED_TENSORS
from rac_modifier.checkpoint.quantization_config import SparsityConfig, SparsityRecord
from rac_modifier.errors import RacError
from rac_modifier.vllm_plugin import METHOD
from rac_modifier.vllm_plugin.readers import (
    BitmaskReader,
    CodesReader,
    PrunedReader,
    WeightReader,
    WordsReader,
    why_not_codes,
)


class Layout:
    """How a checkpoint stores its layers.

    Attributes:
        inner: vLLM's config for the layers that no reader reads.
        kinds: of weights, by the names of `measure_crossovers`.
        targets, ignore: names, "re:" patterns or "Linear" for all, of the compressed modules.
    """

    inner: Any = None
    kinds: tuple[str, ...] = ("floats",)
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()

    def reader(self, layer: Any, modules: list[str]) -> WeightReader | str | None:
        """Return what reads a linear layer of these modules; None: it is not compressed.

        A text is the reason why vLLM's own method runs a quantized layer.
        """
        raise NotImplementedError

    def experts_reader(self) -> WeightReader | str | None:
        """Return what reads routed experts; a text and None like `reader`."""
        return None

    def vocabulary_reader(self, layer: Any, prefix: str) -> WeightReader | None:
        """Return what reads a head or an embedding; None where vLLM's own method runs it."""
        scheme = None if self.inner is None else self.inner.get_scheme_dict(layer, prefix)
        if scheme is None or torch.empty(0).device.type != "cpu":
            return None
        if why_not_codes(scheme, self.inner.quant_format, vocabulary=True) is not None:
            return None
        return CodesReader({prefix: scheme["weights"]})

    def holds(self, module: str) -> bool:
        """Return whether the weight of a linear module, by its name on disk, is compressed."""
        return _matches(module, self.targets) and not _matches(module, self.ignore)


class PackedLayout(Layout):
    """Packed sparse weights of a `quantization_config` with a `sparsity_config`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Parse the entry (RacError: it has no sparsity_config, or a malformed one)."""
        sparsity = SparsityConfig.of(config)
        if sparsity is None:
            raise RacError(
                "config.json: quantization_config has no sparsity_config; restore the config.json "
                "that was saved with the checkpoint"
            )
        self.targets, self.ignore = sparsity.targets, sparsity.ignore
        quantized = bool(config.get("config_groups"))
        if quantized:  # vLLM refuses any sparsity_config
            self.inner = _compressed_tensors(config)
        self.packed = BitmaskReader(sparsity.format, quantized)
        self.kinds = _kinds(config)

    def reader(self, layer: Any, modules: list[str]) -> WeightReader | None:
        """Return the reader of packed weights where any of the modules is packed."""
        return self.packed if any(self.holds(module) for module in modules) else None

    def experts_reader(self) -> WeightReader:
        """Return the same reader."""
        return self.packed


class PrunedLayout(Layout):
    """Pruned weights that are stored dense: the modules that `rac_sparsity` lists."""

    def __init__(self, record: SparsityRecord) -> None:
        if not record.modules:
            raise RacError(
                "config.json: rac_sparsity names no pruned module, so there is nothing to serve "
                f"sparse; leave out --quantization {METHOD}, or save the model with rac-modifier"
            )
        self.targets = tuple(record.modules)

    def reader(self, layer: Any, modules: list[str]) -> WeightReader | None:
        """Return the reader of pruned weights where any of the modules is pruned."""
        return PrunedReader() if any(self.holds(module) for module in modules) else None


class CodesLayout(Layout):
    """Dense weights of 2 to 4 bits (W4A16) of compressed-tensors."""

    kinds = ("int4",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Parse the entry (RacError: no weights that the kernels read)."""
        self.inner = _compressed_tensors(config)
        reasons = [
            why_not_codes(scheme, self.inner.quant_format, bool(OF_VOCABULARY.search(target)))
            for target, scheme in self.inner.target_scheme_map.items()
        ]
        if config.get("transform_config"):
            reasons = ["its inputs or outputs are transformed"]
        if None not in reasons:
            raise no_effect(str(reasons[0]) if reasons else "it quantizes nothing")

    def reader(self, layer: Any, modules: list[str]) -> WeightReader | str | None:
        """Return a reader of codes; vLLM runs other schemes."""
        schemes = {module: self.inner.get_scheme_dict(layer, module) for module in modules}
        quantized = [scheme for scheme in schemes.values() if scheme is not None]
        for scheme in quantized:
            if reason := why_not_codes(scheme, self.inner.quant_format):
                return reason
        weights = {name: scheme and scheme["weights"] for name, scheme in schemes.items()}
        return CodesReader(weights) if quantized else None

    def experts_reader(self) -> str:
        """Leave experts to vLLM."""
        return "dense experts of few bits have no kernel"


class WordsLayout(Layout):
    """GPTQ and AWQ checkpoints. The tensors say which layers are quantized."""

    kinds = ("int4",)

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Parse the entry (RacError: malformed, or words of another layout)."""
        self.words = WordsReader(config)

    def reader(self, layer: Any, modules: list[str]) -> WeightReader:
        """Return the same reader for each layer."""
        return self.words

    def experts_reader(self) -> WeightReader:
        """Refuse experts."""
        raise no_effect("experts of this format have no kernel")

    def vocabulary_reader(self, layer: Any, prefix: str) -> WeightReader | None:
        """Return the reader for a head that config.json quantizes."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        return self.words if self.words.head and isinstance(layer, ParallelLMHead) else None


def is_packed(quantization: object) -> bool:
    """Return whether a `quantization_config`, of any type, means packed sparse weights.

    `quant_method` is "rac"; older files have "compressed-tensors".
    """
    if not isinstance(quantization, Mapping):
        return False
    method = quantization.get("quant_method")
    sparsity = quantization.get("sparsity_config")
    format = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    ours = isinstance(format, str) and format in PARTS
    return method == METHOD or (method == COMPRESSED_TENSORS and ours)


def no_effect(reason: str) -> RacError:
    """Return the error for a checkpoint on which the option changes nothing."""
    return RacError(
        f"--quantization {METHOD}: it has no effect on this checkpoint, since {reason}; "
        "leave it out"
    )


def _compressed_tensors(config: Mapping[str, Any]) -> Any:
    """Return vLLM's own config for the weights that compressed-tensors quantizes."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    without = {key: value for key, value in config.items() if key != "sparsity_config"}
    return CompressedTensorsConfig.from_config(without)


def _kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the kernels multiply the weights as: "floats", "int8", "int4"."""
    groups = [group.get("weights") for group in (config.get("config_groups") or {}).values()]
    kinds = {
        f"int{weights.get('num_bits')}" if weights.get("type", "int") == "int" else "floats"
        for weights in groups
        if isinstance(weights, Mapping)
    }
    return tuple(sorted(kinds & {"int8", "int4", "floats"})) or ("floats",)


def _matches(module: str, entries: Iterable[str]) -> bool:
    """Match the whole name, or a pattern from its start; "Linear" matches all."""
    return any(
        re.match(entry[3:], module) is not None
        if entry.startswith("re:")
        else entry in (module, "Linear")
        for entry in entries
    )
