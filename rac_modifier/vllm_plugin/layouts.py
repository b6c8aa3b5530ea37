"""How a checkpoint stores its layers: a layout gives a layer's reader, or why there is none.

A reader checks the tensors of a module as untrusted input.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rac_modifier.checkpoint import gptq_awq
from rac_modifier.checkpoint.formats import FORMAT_BITMASK, FORMATS
from rac_modifier.errors import RacError
from rac_modifier.formats.bitmask import damaged, part_of
from rac_modifier.formats.quantization_config import METHOD as COMPRESSED_TENSORS
from rac_modifier.formats.quantization_config import (
    TRANSFORMED,
    SparsityConfig,
    WeightScheme,
    has_block_scales,
    rotates_activations,
    weight_schemes,
    without_sparsity,
)
from rac_modifier.formats.stored_weight import (
    FLOATS,
    PER_BLOCK,
    SCALE,
    StoredWeight,
    check_scale,
    dequantize,
)
from rac_modifier.formats.words import (
    OF_VOCABULARY,
    ORDER,
    WORDS,
    ZEROS,
    PackQuantized,
)
from rac_modifier.vllm_plugin import METHOD

_RESTORE = "restore the config.json that was saved with the checkpoint"
# Scales of activations are not used: the kernels round activations less than any scheme does.
_UNUSED = ("input_scale", "input_zero_point")

Weight = StoredWeight | Tensor  # compressed, or in floats [N, K]


class WeightReader:
    """Reads one module; `dtypes`: its tensors' names and dtypes on disk (None: the model's)."""

    dtypes: Mapping[str, torch.dtype | None]

    def read(self, tensors: Mapping[str, Tensor], module: str) -> Weight:
        """Check the tensors of `module`; return its weight (RacError names a damaged one)."""
        raise NotImplementedError

    def holds(self, module: str) -> bool:
        """Return whether the weight of a linear module, by its name on disk, is compressed."""
        raise NotImplementedError


class CodesReader(WeightReader):
    """Dense weights of compressed-tensors; `schemes` by module, None for a module in floats."""

    dtypes = PackQuantized.dtypes

    def __init__(self, schemes: Mapping[str, WeightScheme | None]) -> None:
        self.schemes = schemes
        self.symmetric = all(scheme is None or scheme.symmetric for scheme in schemes.values())

    def holds(self, module: str) -> bool:
        """Return whether the module has a scheme."""
        return self.schemes.get(module) is not None

    def read(self, tensors: Mapping[str, Tensor], module: str) -> Weight:
        """Return the weight with every value stored; a tensor where nothing is quantized."""
        # A layer that is fused on disk, too, has its own name, and the scheme of its shards.
        scheme = self.schemes.get(module, next(iter(self.schemes.values())))
        if scheme is None:
            return _floats_of(tensors, module)
        if scheme.bits != 8 and "weight" in tensors:
            raise RacError(
                f"{module}.weight: not quantized, but config.json says int{scheme.bits}; {_RESTORE}"
            )
        return PackQuantized.check(tensors, module, scheme)


class Layout(WeightReader):
    """How a checkpoint stores its layers. Most layouts read all layers themselves."""

    inner: Any = None  # vLLM's config for the layers that no reader reads
    # Names, "re:" patterns or "Linear" for all, of the compressed modules.
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()

    def reader(self, layer: Any, modules: list[str]) -> WeightReader | str | None:
        """Return what reads these modules, or why vLLM's method runs them; None: dense."""
        return self if any(self.holds(module) for module in modules) else None

    def experts_reader(self, layer: Any, prefix: str) -> WeightReader | str | None:
        """Return what reads routed experts; a text and None like `reader`."""
        return self

    def vocabulary_reader(self, layer: Any, prefix: str) -> WeightReader | None:
        """Return what reads a head or an embedding; None where vLLM's own method runs it."""
        scheme = self._scheme(layer, prefix)
        if scheme is None or torch.empty(0).device.type != "cpu":
            return None
        return None if scheme.why_no_kernel(vocabulary=True) else CodesReader({prefix: scheme})

    def holds(self, module: str) -> bool:
        """Return whether the weight of a linear module, by its name on disk, is compressed."""
        return _matches(module, self.targets) and not _matches(module, self.ignore)

    def _scheme(self, layer: Any, module: str) -> WeightScheme | None:
        """Return the scheme that vLLM's config has for a module; None: it is not quantized."""
        scheme = None if self.inner is None else self.inner.get_scheme_dict(layer, module)
        return None if scheme is None else _scheme_of(scheme, self.inner.quant_format)


class PackedLayout(Layout):
    """Packed sparse weights of a `quantization_config` with a `sparsity_config`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        sparsity = SparsityConfig.of(config)
        assert sparsity is not None  # `is_packed`
        if rotates_activations(config):
            raise RacError(
                "config.json has rotations of activations, which packed weights do not get; "
                "rac unpack, and serve the dense checkpoint"
            )
        self.targets, self.ignore = sparsity.targets, sparsity.ignore
        self.format, self.quantized = FORMATS[sparsity.format], bool(config.get("config_groups"))
        self.block_scales = has_block_scales(weight_schemes(config))
        stored: dict[str, torch.dtype | None] = {
            "bitmask": torch.uint8,
            "row_offsets": torch.int64,
            "shape": torch.int64,
        }
        names = [*self.format.parts, "weight"]  # an ignored shard of a fused layer has a weight
        if self.quantized or without_sparsity(config).get("kv_cache_scheme"):
            self.inner = _compressed_tensors(config)
        if self.quantized:
            stored.update(PackQuantized.dtypes)
            names += [*PackQuantized.dtypes, *_UNUSED]
        self.dtypes = {name: stored.get(name) for name in names}

    def read(self, tensors: Mapping[str, Tensor], module: str) -> Weight:
        """Return the weight, sparse or of dense codes; a tensor where it is stored in floats."""
        if WORDS in tensors:  # packing this part of a fused layer would have gained nothing
            scheme = self._scheme(torch.nn.Linear(1, 1, device="meta"), module)
            if scheme is None:
                raise RacError(
                    f"{module}.{WORDS}: config.json does not quantize this module; {_RESTORE}"
                )
            return PackQuantized.check(tensors, module, scheme)
        for part in (ZEROS, ORDER):
            if part in tensors:
                raise RacError(
                    f"{module}.{part}: zeros of a weight that is not quantized symmetrically are "
                    "not zero, so it cannot be sparse; quantize it symmetrically"
                )
        if "weight" not in tensors:
            sparse = self.format.check(tensors, module, self.block_scales)
            if sparse.per_block:
                raise RacError(f"{module}.{SCALE}: {PER_BLOCK}; rac unpack writes the model dense")
            return sparse
        weight = _matrix_of(tensors, module)
        if tensors.keys() & {*FORMATS[FORMAT_BITMASK].parts}:
            raise RacError(f"{module}.weight: stored both dense and packed; save the model again")
        if not self.quantized or (weight.dtype in FLOATS and SCALE not in tensors):
            return weight
        rows, columns = weight.shape
        scale = check_scale(tensors, weight.dtype, rows, columns, module)
        return dequantize(weight, scale, torch.float32)


class CodesLayout(Layout):
    """Dense weights of 2 to 4 bits (W4A16) of compressed-tensors."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.inner = _compressed_tensors(config)
        reasons = []
        for target, scheme in self.inner.target_scheme_map.items():
            vocabulary = bool(OF_VOCABULARY.search(target))
            reasons.append(_scheme_of(scheme, self.inner.quant_format).why_no_kernel(vocabulary))
        if config.get("transform_config"):
            reasons = [TRANSFORMED]
        if None not in reasons:
            raise no_effect(str(reasons[0]) if reasons else "it quantizes nothing")

    def reader(self, layer: Any, modules: list[str]) -> WeightReader | str | None:
        """Return a reader of codes; vLLM runs other schemes."""
        schemes = {module: self._scheme(layer, module) for module in modules}
        quantized = [scheme for scheme in schemes.values() if scheme is not None]
        for scheme in quantized:
            if reason := scheme.why_no_kernel():
                return reason
        return CodesReader(schemes) if quantized else None

    def experts_reader(self, layer: Any, prefix: str) -> WeightReader | str | None:
        """Return a reader of codes; vLLM runs other schemes."""
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        modules = [
            f"{prefix}.{number}.{name}"
            for number in range(layer.global_num_experts)
            for name in names
        ]
        return self.reader(torch.nn.Linear(1, 1, device="meta"), modules)


class WordsLayout(Layout):
    """GPTQ of 2, 3, 4 or 8 bits and AWQ of 4; the tensors say which layers are quantized."""

    dtypes: Mapping[str, torch.dtype | None] = {
        **dict.fromkeys(gptq_awq.PARTS, torch.int32),
        **dict.fromkeys((gptq_awq.SCALES, "weight")),
    }

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.format = gptq_awq.FORMATS[config["quant_method"]].of(config)

    def vocabulary_reader(self, layer: Any, prefix: str) -> WeightReader | None:
        """Return the layout itself for a head that config.json quantizes."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        return self if self.format.lm_head and isinstance(layer, ParallelLMHead) else None

    def read(self, tensors: Mapping[str, Tensor], module: str) -> Weight:
        """Return the weight with every value stored; a tensor where it is in floats."""
        if "weight" in tensors:
            return _floats_of(tensors, module)
        return self.format.check(tensors, module)


def is_packed(quantization: object) -> bool:
    """Return whether a `quantization_config`, of any type, means packed sparse weights."""
    if not isinstance(quantization, Mapping):
        return False
    method, sparsity = quantization.get("quant_method"), quantization.get("sparsity_config")
    format = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    return method == COMPRESSED_TENSORS and isinstance(format, str) and format in FORMATS


def no_effect(reason: str) -> RacError:
    """Return the error for a checkpoint on which the option changes nothing."""
    effect = "it has no effect on this checkpoint"
    return RacError(f"--quantization {METHOD}: {effect}, since {reason}; leave it out")


def _compressed_tensors(config: Mapping[str, Any]) -> Any:
    """Return vLLM's own config for the weights that compressed-tensors quantizes."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    return CompressedTensorsConfig.from_config(without_sparsity(config))


def _scheme_of(scheme: Mapping[str, Any], format: str | None) -> WeightScheme:
    """Convert a scheme of vLLM's config; `format`: of the checkpoint, for one without."""
    rounded = scheme.get("input_activations") or scheme.get("output_activations")
    group = {
        "weights": scheme["weights"].model_dump(mode="json"),  # names instead of enums
        "input_activations": rounded and rounded.model_dump(mode="json"),
        "format": scheme.get("format"),
    }
    return WeightScheme.of(group, format)


def _floats_of(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """Return a module's only tensor, `weight` [N, K] in floats."""
    weight = _matrix_of(tensors, module)
    if weight.dtype not in FLOATS or len(tensors) > 1:
        raise RacError(
            f"{module}.weight: {weight.dtype} next to {sorted(tensors)}, but config.json does not "
            f"quantize it so; {_RESTORE}"
        )
    return weight


def _matrix_of(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """Return the tensor `weight` [N, K] of a module."""
    weight = part_of(tensors, module, "weight")
    if weight.dim() != 2 or not weight.numel():
        raise damaged(f"{module}.weight", f"shape {list(weight.shape)} is not that of a matrix")
    return weight


def _matches(module: str, entries: Iterable[str]) -> bool:
    """Match the whole name, or a pattern from its start; "Linear" matches all."""
    patterns = (entry[3:] for entry in entries if entry.startswith("re:"))
    return bool({module, "Linear"} & {*entries}) or any(re.match(p, module) for p in patterns)
