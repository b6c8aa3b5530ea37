"""How a checkpoint stores its layers: a layout gives a layer's reader, or why there is none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rac_modifier.checkpoint import dense_codes, gptq_awq
from rac_modifier.checkpoint.formats import FORMAT_BITMASK, PARTS, check
from rac_modifier.checkpoint.quantization_config import METHOD as COMPRESSED_TENSORS
from rac_modifier.checkpoint.quantization_config import SparsityConfig, SparsityRecord
from rac_modifier.checkpoint.stored_weight import FLOATS, SCALE, check_scale, dequantize, from_dense
from rac_modifier.errors import RacError
from rac_modifier.vllm_plugin import METHOD
from rac_modifier.vllm_plugin.readers import (
    RESTORE,
    CodesReader,
    LoadedWeight,
    WeightReader,
    floats_of,
    matrix_of,
    why_not_codes,
)

# Scales of activations are not used: the kernels round activations less than any scheme does.
_UNUSED = ("input_scale", "input_zero_point")


class Layout:
    """How a checkpoint stores its layers. Most layouts read all layers themselves."""

    inner: Any = None  # vLLM's config for the layers that no reader reads
    # Names, "re:" patterns or "Linear" for all, of the compressed modules.
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    dtypes: Mapping[str, torch.dtype | None]

    def read(self, tensors: Mapping[str, Tensor], module: str) -> LoadedWeight:
        """Check the tensors of `module`; return its weight (RacError names a damaged one)."""
        raise NotImplementedError

    def reader(self, layer: Any, modules: list[str]) -> WeightReader | str | None:
        """Return what reads a linear layer of these modules; None: it is not compressed.

        A text is the reason why vLLM's own method runs a quantized layer.
        """
        return self if any(self.holds(module) for module in modules) else None

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
        sparsity = SparsityConfig.of(config)
        if sparsity is None:
            raise RacError(f"config.json: quantization_config has no sparsity_config; {RESTORE}")
        self.targets, self.ignore = sparsity.targets, sparsity.ignore
        self.format, self.quantized = sparsity.format, bool(config.get("config_groups"))
        stored = {"bitmask": torch.uint8, "row_offsets": torch.int64, "shape": torch.int64}
        names = [*PARTS[self.format], "weight"]  # an ignored shard of a fused layer has a weight
        if self.quantized:
            self.inner = _compressed_tensors(config)
            names += [SCALE, *_UNUSED, dense_codes.ZEROS, dense_codes.ORDER]
        self.dtypes = {name: stored.get(name) for name in names}

    def experts_reader(self) -> WeightReader:
        """Return the layout itself."""
        return self

    def read(self, tensors: Mapping[str, Tensor], module: str) -> LoadedWeight:
        """Return the sparse weight; a tensor where it is stored dense."""
        for part in (dense_codes.ZEROS, dense_codes.ORDER):
            if part in tensors:
                raise RacError(
                    f"{module}.{part}: zeros of a weight that is not quantized symmetrically are "
                    "not zero, so it cannot be sparse; quantize it symmetrically"
                )
        if "weight" not in tensors:
            return LoadedWeight(check(tensors, self.format, module))
        weight = matrix_of(tensors, module)
        if tensors.keys() & {*PARTS[FORMAT_BITMASK]}:
            raise RacError(f"{module}.weight: stored both dense and packed; save the model again")
        if not self.quantized or (weight.dtype in FLOATS and SCALE not in tensors):
            return LoadedWeight(weight)
        rows, columns = weight.shape
        scale = check_scale(tensors, weight.dtype, rows, columns, module)
        return LoadedWeight(dequantize(weight, scale, torch.float32))


class PrunedLayout(Layout):
    """Pruned weights that are stored dense: the modules that `rac_sparsity` lists."""

    dtypes: Mapping[str, torch.dtype | None] = {"weight": None}

    def __init__(self, record: SparsityRecord) -> None:
        if not record.modules:
            raise RacError(
                "config.json: rac_sparsity names no pruned module, so there is nothing to serve "
                f"sparse; leave out --quantization {METHOD}, or save the model with rac-modifier"
            )
        self.targets = tuple(record.modules)

    def read(self, tensors: Mapping[str, Tensor], module: str) -> LoadedWeight:
        """Return the sparse form of the dense weight."""
        return LoadedWeight(from_dense(matrix_of(tensors, module), module))


class CodesLayout(Layout):
    """Dense weights of 2 to 4 bits (W4A16) of compressed-tensors."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.inner = _compressed_tensors(config)
        reasons = [
            why_not_codes(
                scheme, self.inner.quant_format, bool(dense_codes.OF_VOCABULARY.search(target))
            )
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
    """GPTQ of 2, 3, 4 or 8 bits and AWQ of 4; the tensors say which layers are quantized."""

    dtypes: Mapping[str, torch.dtype | None] = {
        **dict.fromkeys(gptq_awq.PARTS, torch.int32),
        **dict.fromkeys((gptq_awq.SCALES, "weight")),
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        of_gptq = config["quant_method"] == "gptq"
        self.gptq = gptq_awq.GptqEntries.of(config) if of_gptq else None
        self.awq = None if of_gptq else gptq_awq.AwqEntries.of(config)

    def experts_reader(self) -> WeightReader:
        """Refuse experts."""
        raise no_effect("experts of this format have no kernel")

    def vocabulary_reader(self, layer: Any, prefix: str) -> WeightReader | None:
        """Return the layout itself for a head that config.json quantizes."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        quantized = self.gptq is not None and self.gptq.lm_head
        return self if quantized and isinstance(layer, ParallelLMHead) else None

    def read(self, tensors: Mapping[str, Tensor], module: str) -> LoadedWeight:
        """Return the weight with every value stored; a tensor where it is in floats."""
        if "weight" in tensors:
            return LoadedWeight(floats_of(tensors, module))
        if self.awq is not None:
            return LoadedWeight(gptq_awq.check_awq(tensors, module, self.awq))
        assert self.gptq is not None
        return LoadedWeight(*gptq_awq.check_gptq(tensors, module, self.gptq))


def is_packed(quantization: object) -> bool:
    """Return whether a `quantization_config`, of any type, means packed sparse weights."""
    if not isinstance(quantization, Mapping):
        return False
    method, sparsity = quantization.get("quant_method"), quantization.get("sparsity_config")
    format = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    ours = isinstance(format, str) and format in PARTS
    return method == METHOD or (method == COMPRESSED_TENSORS and ours)  # of older files


def no_effect(reason: str) -> RacError:
    """Return the error for a checkpoint on which the option changes nothing."""
    effect = "it has no effect on this checkpoint"
    return RacError(f"--quantization {METHOD}: {effect}, since {reason}; leave it out")


def _compressed_tensors(config: Mapping[str, Any]) -> Any:
    """Return vLLM's own config for the weights that compressed-tensors quantizes."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    without = {key: value for key, value in config.items() if key != "sparsity_config"}
    return CompressedTensorsConfig.from_config(without)


def _matches(module: str, entries: Iterable[str]) -> bool:
    """Match the whole name, or a pattern from its start; "Linear" matches all."""
    patterns = (entry[3:] for entry in entries if entry.startswith("re:"))
    return bool({module, "Linear"} & {*entries}) or any(re.match(p, module) for p in patterns)
