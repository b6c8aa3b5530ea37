"""What the configs of GPTQ and AWQ checkpoints share when `--quantization rac` was given.

Each is also vLLM's own config for its format, so whatever has no kernel here is served as without this package. Imported when
such a checkpoint is served: vLLM has loaded its layers by then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from rac_modifier.checkpoint.dense_codes import BITS
from rac_modifier.checkpoint.files import check_index
from rac_modifier.errors import RacError
from rac_modifier.vllm_plugin import METHOD
from rac_modifier.vllm_plugin.activations import activation_bits, check_effect
from rac_modifier.vllm_plugin.crossover import crossovers, use_crossovers
from rac_modifier.vllm_plugin.gptq_awq_linear import (
    GptqAwqLinearMethod,
    GptqAwqShards,
    Reader,
    RefusedByVllm,
    left_to_vllm,
    refused,
)
from rac_modifier.vllm_plugin.sparse_layers import fused_modules, stored_name
from rac_modifier.vllm_plugin.stored_vocabulary import VocabularyMethods
from rac_modifier.vllm_plugin.summary import Summary

RESTORE = "restore the config.json that was saved with the checkpoint"
_FLOATS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod, UnquantizedFusedMoEMethod)


class Scheme(NamedTuple):
    """How a module is quantized. `group` None: one scale per row."""

    bits: int
    group: int | None
    symmetric: bool


class CodesConfig(QuantizationConfig):
    """Comes before vLLM's config of a format among the bases of a class, which adds the three methods at the end."""

    def set_up(self, bits: Iterable[int]) -> None:
        """Begin the summary. `bits`: those of the checkpoint that our kernels read."""
        self.crossovers: dict[str, float] = {}
        kinds = " or ".join(f"int{each}" for each in sorted({*bits}, reverse=True))
        self.summary = Summary(layers="quantized layers", kernel=f"an {kinds} kernel")
        self.vocabulary = VocabularyMethods()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """vLLM calls this once before it loads anything, with the checkpoint's folder or its name on the hub.

        Raises:
            RacError: the folder lacks a tensor of its index, which vLLM notices in unquantized models only.
        """
        from vllm.platforms import current_platform

        check_index(model_name)
        super().maybe_update_config(model_name, hf_config=hf_config, revision=revision)
        check_effect(integers=True, on_cpu=current_platform.is_cpu())
        if current_platform.is_cpu():
            self.crossovers = crossovers(("int4",), activation_bits() == 8)

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations; vLLM's own methods have no float32."""
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Ours for a linear layer of 2 to 4 bits; else vLLM's own, with the reason in the summary where it is quantized.

        Raises:
            RacError: parts of a fused layer are quantized differently, or experts or a head have no method at all.
        """
        prefix = stored_name(prefix)
        use_crossovers(self.crossovers)
        if isinstance(layer, VocabParallelEmbedding):
            return self.vocabulary.choose(
                layer, prefix, None, partial(self._quantized_head, layer, prefix)
            )
        if isinstance(layer, RoutedExperts):
            return self._vllms(layer, prefix, "dense experts of few bits have no kernel")
        if isinstance(layer, LinearBase):
            return self._linear(layer, prefix)
        return super().get_quant_method(layer, prefix)

    def _linear(self, layer: LinearBase, prefix: str) -> QuantizeMethodBase:
        modules = fused_modules(prefix, self.packed_modules_mapping)
        schemes = {module: self.scheme_of(layer, module) for module in modules}
        if len({*schemes.values()}) > 1:
            kinds = ", ".join(
                f"{module}: {_describe(scheme)}" for module, scheme in schemes.items()
            )
            raise RacError(
                f"{prefix}: its parts are quantized differently ({kinds}), and are one layer in vLLM; quantize them alike"
            )
        scheme = schemes[modules[0]]
        if scheme is None:
            return UnquantizedLinearMethod()
        inner = self._inner(layer, prefix, scheme)
        if scheme.bits not in BITS:
            return left_to_vllm(inner, self.summary, prefix, f"its weights are int{scheme.bits}")
        shards = GptqAwqShards(
            prefix, modules, scheme.group, scheme.symmetric, scheme.bits, self.reader_of(scheme)
        )
        return GptqAwqLinearMethod(shards, inner, self.summary, activation_bits())

    def _inner(self, layer: LinearBase, prefix: str, scheme: Scheme) -> LinearMethodBase:
        """vLLM's own method of a quantized linear layer, or one that raises the reason why there is none."""
        reason = self.why_vllm_refuses(layer, prefix, scheme)
        if reason is not None:
            return RefusedByVllm(reason)
        try:
            return super().get_quant_method(layer, prefix)
        except ValueError as error:
            return RefusedByVllm(str(error))

    def _vllms(self, layer: torch.nn.Module, prefix: str, reason: str) -> QuantizeMethodBase | None:
        """vLLM's own method of experts or a head, which records the `reason` if they are quantized."""
        refusal = self.why_vllm_refuses(layer, prefix, None)
        try:
            method = super().get_quant_method(layer, prefix)
        except (ValueError, NotImplementedError) as error:
            raise refused(prefix, reason, refusal or error) from error
        if method is None or isinstance(method, _FLOATS):
            return method
        if refusal is not None:
            raise refused(prefix, reason, refusal)
        return left_to_vllm(method, self.summary, prefix, reason)

    def _quantized_head(
        self, layer: VocabParallelEmbedding, prefix: str
    ) -> QuantizeMethodBase | None:
        """vLLM's own method of a head; None where it is in floats."""
        method = self._vllms(layer, prefix, "heads of this format have no kernel")
        return None if isinstance(method, _FLOATS) else method

    def scheme_of(self, layer: torch.nn.Module, module: str) -> Scheme | None:
        """How a linear module of the checkpoint is quantized; None where it is in floats."""
        raise NotImplementedError

    def why_vllm_refuses(
        self, layer: torch.nn.Module, prefix: str, scheme: Scheme | None
    ) -> str | None:
        """Why vLLM's own method does not run a layer, if config.json says it. `scheme` None: of experts or a head."""
        return None

    def reader_of(self, scheme: Scheme) -> Reader:
        """What reads the tensors of a module."""
        raise NotImplementedError


def entry(
    config: Mapping[str, Any], names: tuple[str, ...], kind: type, default: Any = None
) -> Any:
    """The first of `names` that `quantization_config` has, if it is a `kind`.

    Raises:
        RacError: it has none of them and there is no default, or another kind of value.
    """
    for name in names:
        if name in config:
            value = config[name]
            if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
                return value
            if value is None and default is not None:
                return default
            raise RacError(
                f"config.json: quantization_config.{name} is {value!r}, but must be {_KINDS[kind]}; {RESTORE}"
            )
    if default is None:
        raise RacError(f"config.json: quantization_config has no {' or '.join(names)}; {RESTORE}")
    return default


def group_of(size: int, name: str = "group_size") -> int | None:
    """Columns that share a scale; None for -1, one scale per row.

    Raises:
        RacError: another number below 1.
    """
    if size != -1 and size < 1:
        raise RacError(
            f"config.json: quantization_config.{name} is {size}, but must be a number of columns, or -1 for one scale per row; "
            f"{RESTORE}"
        )
    return None if size == -1 else size


def no_effect(reason: str) -> RacError:
    """The error for a checkpoint on which the option changes nothing."""
    return RacError(
        f"--quantization {METHOD}: it has no effect on this checkpoint, since {reason}; leave it out"
    )


_KINDS = {bool: "true or false", int: "a whole number", str: "a text", dict: "a table"}


def _describe(scheme: Scheme | None) -> str:
    if scheme is None:
        return "floats"
    groups = "one scale per row" if scheme.group is None else f"groups of {scheme.group}"
    return f"int{scheme.bits} with {groups}, {'symmetric' if scheme.symmetric else 'asymmetric'}"
