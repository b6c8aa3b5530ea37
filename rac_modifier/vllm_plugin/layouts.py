"""How a checkpoint stores its layers: a layout gives a layer's reader, or why there is none."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from rac_modifier.checkpoint import gptq_awq
from rac_modifier.checkpoint.formats import FORMATS
from rac_modifier.errors import RacError
from rac_modifier.formats.bitmask import contradicts
from rac_modifier.formats.module_names import targets_vocabulary
from rac_modifier.formats.quantization_config import (
    COMPRESSED_TENSORS,
    SparsityConfig,
    WeightScheme,
    rotates_activations,
    weight_schemes,
    why_left_to_vllm,
    without_sparsity,
)
from rac_modifier.vllm_plugin import METHOD
from rac_modifier.vllm_plugin.readers import (
    CodesReader,
    GptqAwqReader,
    PackedReader,
    WeightReader,
)


class Layout:
    """How a checkpoint stores its layers: the reader of each."""

    inner: Any = None  # vLLM's config for the layers that no reader reads
    # Names, "re:" patterns or "Linear" for all, of the compressed modules.
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def reader(self, layer: Any, modules: list[str]) -> WeightReader | str | None:
        """Return what reads these modules, or why vLLM's method runs them; None: dense."""
        raise NotImplementedError

    def experts_reader(self, layer: Any, prefix: str) -> WeightReader | str | None:
        """Return what reads routed experts; a text and None like `reader`."""
        raise NotImplementedError

    def vocabulary_reader(self, layer: Any, prefix: str) -> WeightReader | None:
        """Return what reads a head or an embedding; None where vLLM's own method runs it."""
        scheme = self._scheme(layer, prefix)
        if scheme is None or torch.empty(0).device.type != "cpu":
            return None
        left = why_left_to_vllm(self.config, (scheme,), vocabulary=True)
        return None if left else CodesReader({prefix: scheme})

    def holds(self, layer: Any, module: str) -> bool:
        """Return whether the weight of a linear module, by its name on disk, is compressed."""
        return _matches(module, self.targets) and not _matches(module, self.ignore)

    def _scheme(self, layer: Any, module: str) -> WeightScheme | None:
        """Return the scheme that vLLM's config has for a module; None: it is not quantized."""
        scheme = None if self.inner is None else self.inner.get_scheme_dict(layer, module)
        return None if scheme is None else _scheme_of(scheme, self.inner.quant_format)


class PackedLayout(Layout):
    """Packed sparse weights of a `quantization_config` with a `sparsity_config`; their reader."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        sparsity = SparsityConfig.of(config)
        assert sparsity is not None  # `is_packed`
        if rotates_activations(config):
            raise RacError(
                "config.json has rotations of activations, which packed weights do not get; "
                "rac unpack, and serve the dense checkpoint"
            )
        self.targets, self.ignore = sparsity.targets, sparsity.ignore
        quantized = bool(config.get("config_groups"))
        if quantized or without_sparsity(config).get("kv_cache_scheme"):
            self.inner = _compressed_tensors(config)
        schemes = weight_schemes(config)
        self.packed = PackedReader(FORMATS[sparsity.format], quantized, schemes, self._scheme)

    def reader(self, layer: Any, modules: list[str]) -> WeightReader | None:
        """Return the reader of packed weights if one of the modules is packed."""
        return self.packed if any(self.holds(layer, module) for module in modules) else None

    def experts_reader(self, layer: Any, prefix: str) -> WeightReader:
        """Return the reader of packed weights."""
        return self.packed


class CodesLayout(Layout):
    """Dense weights of 2 to 4 bits (W4A16) of compressed-tensors."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.inner = _compressed_tensors(config)
        reasons = []
        for target, scheme in self.inner.target_scheme_map.items():
            known = _scheme_of(scheme, self.inner.quant_format)
            reasons.append(why_left_to_vllm(config, (known,), targets_vocabulary(target)))
        if None not in reasons:
            raise no_effect(str(reasons[0]) if reasons else "it quantizes nothing")

    def reader(self, layer: Any, modules: list[str]) -> WeightReader | str | None:
        """Return a reader of codes; vLLM runs other schemes."""
        schemes = {module: self._scheme(layer, module) for module in modules}
        quantized = [scheme for scheme in schemes.values() if scheme is not None]
        for scheme in quantized:
            if reason := why_left_to_vllm(self.config, (scheme,), vocabulary=False):
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

    def holds(self, layer: Any, module: str) -> bool:
        """Return whether the module has a scheme."""
        return self._scheme(layer, module) is not None


class GptqAwqLayout(Layout):
    """GPTQ of 2, 3, 4 or 8 bits and AWQ of 4; the tensors say which layers are quantized."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        format = gptq_awq.format_of(config)
        assert format is not None  # `RacConfig.from_config`
        self.format = GptqAwqReader(format)

    def reader(self, layer: Any, modules: list[str]) -> WeightReader:
        """Return the reader of all layers."""
        return self.format

    def experts_reader(self, layer: Any, prefix: str) -> WeightReader:
        """Return the reader of all layers."""
        return self.format

    def vocabulary_reader(self, layer: Any, prefix: str) -> WeightReader | None:
        """Return the reader for a head that config.json quantizes."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        quantized = self.format.entries.lm_head and isinstance(layer, ParallelLMHead)
        return self.format if quantized else None


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
    """Return vLLM's own config for the weights that compressed-tensors quantizes (RacError)."""
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    weight_schemes(config)  # vLLM's errors name no field
    try:
        stated = {**without_sparsity(config), "ignore": config.get("ignore") or []}
        return CompressedTensorsConfig.from_config(stated)
    except Exception as error:  # vLLM and pydantic have many
        fault = f"vLLM cannot read it ({type(error).__name__}: {str(error)[:300]})"
        raise contradicts("config.json: quantization_config", fault) from error


def _scheme_of(scheme: Mapping[str, Any], format: str | None) -> WeightScheme:
    """Convert a scheme of vLLM's config; `format`: of the checkpoint, for one without."""
    rounded = scheme.get("input_activations") or scheme.get("output_activations")
    group = {
        "weights": scheme["weights"].model_dump(mode="json"),  # names instead of enums
        "input_activations": rounded and rounded.model_dump(mode="json"),
        "format": scheme.get("format"),
    }
    return WeightScheme.of(group, format)


def _matches(module: str, entries: Iterable[str]) -> bool:
    """Match the whole name, or a pattern from its start; "Linear" matches all."""
    patterns = (entry[3:] for entry in entries if entry.startswith("re:"))
    return bool({module, "Linear"} & {*entries}) or any(re.match(p, module) for p in patterns)
