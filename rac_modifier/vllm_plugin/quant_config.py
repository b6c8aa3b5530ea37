"""The quantization config from which vLLM gets the method of each layer.

Modules that need vLLM's layers are imported in `get_quant_method`: at registration vLLM has not loaded its layers yet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from rac_modifier.checkpoint.files import check_index
from rac_modifier.checkpoint.sparsity_config import METHOD as COMPRESSED_TENSORS
from rac_modifier.checkpoint.sparsity_config import RAC_KEY, SparsityRecord
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import has_backend
from rac_modifier.vllm_plugin import METHOD, OLD_METHOD
from rac_modifier.vllm_plugin.activations import activation_bits, check_effect
from rac_modifier.vllm_plugin.crossover import crossovers, use_crossovers
from rac_modifier.vllm_plugin.sparse_layers import (
    SparseLayers,
    fused_modules,
    is_in_words,
    is_packed,
    is_quantized,
    kinds_of,
    parse_dense_stored,
    parse_packed,
    stored_name,
)
from rac_modifier.vllm_plugin.summary import Summary

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

    from rac_modifier.vllm_plugin.stored_vocabulary import VocabularyMethods


logger = init_logger(f"vllm.{__name__}")


class RacSparseConfig(QuantizationConfig):
    """Packed sparse checkpoints; and, with `--quantization rac`, pruned ones that are stored dense.

    With this option, a checkpoint of dense weights of 2 to 4 bits gets a `DenseCodesConfig` in its place, or that of GPTQ or AWQ.

    `layers`: what is stored sparse; None until `maybe_update_config` has read it from the config of a dense-stored
    checkpoint. `quantized`: vLLM's own config for weights that are quantized too. `in_words`: whether that expects several
    values per int32.
    """

    def __init__(
        self,
        layers: SparseLayers | None = None,
        quantized: QuantizationConfig | None = None,
        in_words: bool = False,
    ) -> None:
        super().__init__()
        self.layers = layers
        self.quantized = quantized
        self.in_words = in_words
        self.kinds: tuple[str, ...] = ("floats",)  # of weights, as `crossovers` names them
        self.crossovers: dict[str, float] = {}
        self.summary = Summary()
        self.vocabulary: VocabularyMethods | None = None

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim packed sparse checkpoints, and others on request. vLLM calls this for every quantized model."""
        if user_quant == OLD_METHOD:
            warn_of_old_name()
        return METHOD if is_packed(hf_quant_cfg) or user_quant in (METHOD, OLD_METHOD) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """From the checkpoint's `quantization_config`: of this class, or one of dense weights of few bits.

        Raises:
            RacError: `--quantization rac` was given and has no effect on this checkpoint.
        """
        if not is_packed(config):
            if config.get("quant_method") == COMPRESSED_TENSORS:
                from rac_modifier.vllm_plugin.dense_config import DenseCodesConfig

                return DenseCodesConfig.from_config(config)
            if config.get("quant_method") == "gptq":
                from rac_modifier.vllm_plugin.gptq_config import GptqCodesConfig

                return GptqCodesConfig.from_config(config)
            if config.get("quant_method") == "awq":
                from rac_modifier.vllm_plugin.awq_config import AwqCodesConfig

                return AwqCodesConfig.from_config(config)
            raise RacError(
                f"--quantization {METHOD}: this checkpoint is quantized by {config.get('quant_method')!r}, and not packed "
                "sparse; leave the option out"
            )
        quantized = None
        if is_quantized(config):
            from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
                CompressedTensorsConfig,
            )

            # vLLM refuses any sparsity_config, so its config is made of the rest.
            quantized = CompressedTensorsConfig.from_config(
                {k: v for k, v in config.items() if k != "sparsity_config"}
            )
        made = cls(parse_packed(config), quantized, is_in_words(config))
        made.kinds = kinds_of(config)
        return made

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """vLLM calls this once before it loads anything, with the checkpoint's folder or its name on the hub.

        Without a `quantization_config` the weights are stored dense, and `rac_sparsity` lists those that are pruned.

        Raises:
            RacError: the folder lacks a tensor of its index. vLLM checks this for unquantized models only, and would
                otherwise serve, for example, an embedding that was never loaded.
        """
        from vllm.platforms import current_platform

        check_index(model_name)
        record = getattr(hf_config, RAC_KEY, None)
        if self.layers is None:
            self.layers = parse_dense_stored(record)
        elif self.quantized is not None:
            self.layers = replace(
                self.layers, int8_activations=SparsityRecord.of({RAC_KEY: record}).int8_activations
            )
        check_effect(integers=self.quantized is not None, on_cpu=current_platform.is_cpu())
        if current_platform.is_cpu():
            self.crossovers = crossovers(
                self.kinds, activation_bits(bool(self.layers.int8_activations)) == 8
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename modules as vLLM does."""
        assert self.layers is not None
        mapped = {name: hf_to_vllm_mapper.map_name(name) for name in self.layers.names}
        self.layers = self.layers.renamed(
            {old: new for old, new in mapped.items() if new is not None}
        )
        if self.quantized is not None:
            self.quantized.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; None for attention, and for embeddings and lm_head that are in floats, which vLLM runs."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from rac_modifier.vllm_plugin.experts import expand_experts
        from rac_modifier.vllm_plugin.linear import RacSparseLinearMethod
        from rac_modifier.vllm_plugin.shards import Shards
        from rac_modifier.vllm_plugin.sparse_experts import SparseExpertsMethod
        from rac_modifier.vllm_plugin.stored_vocabulary import VocabularyMethods

        assert self.layers is not None
        prefix = stored_name(prefix)
        use_crossovers(self.crossovers)
        if isinstance(layer, LinearBase):
            modules = fused_modules(prefix, self.packed_modules_mapping)
            if not any(self.layers.holds(module) for module in modules):
                return self._inner(layer, prefix) or UnquantizedLinearMethod()
            # Without a kernel for this device, vLLM runs quantized weights dense, unless it expects them in words.
            has_kernels = has_backend(torch.empty(0).device.type)  # vLLM sets the default device
            ours = self.quantized is None or self.in_words or has_kernels
            inner = None if ours else self._inner(layer, prefix)
            scales = "none" if self.quantized is None else "ours" if ours else "vllm's"
            shards = Shards(prefix, modules, self.layers.format, scales)
            bits = activation_bits(set(modules) <= set(self.layers.int8_activations))
            return RacSparseLinearMethod(
                shards, inner or UnquantizedLinearMethod(), self.summary, bits
            )
        if isinstance(layer, RoutedExperts):
            format = self.layers.format
            if format is not None and torch.empty(0).device.type == "cpu":
                scales = "none" if self.quantized is None else "ours"
                return SparseExpertsMethod(layer, prefix, format, scales, self.summary)
            return expand_experts(
                layer, prefix, self.layers, self._inner(layer, prefix), self.summary
            )
        if isinstance(layer, VocabParallelEmbedding):
            self.vocabulary = self.vocabulary or VocabularyMethods()
            return self.vocabulary.choose(
                layer, prefix, self.quantized, lambda: self._inner(layer, prefix)
            )
        return self._inner(layer, prefix)

    def _inner(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """vLLM's own method for quantized weights, if they are."""
        if self.quantized is None:
            return None
        self.quantized.packed_modules_mapping = self.packed_modules_mapping
        return self.quantized.get_quant_method(layer, prefix)

    def get_name(self) -> str:
        """The method's name."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: layers run dense there, and the log has the reason."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No files: without a `quantization_config` vLLM makes an empty config, which `maybe_update_config` fills."""
        return []


class OldNameConfig(RacSparseConfig):
    """`--quantization rac`, the name of `rac` before 0.2. vLLM creates it for weights that are stored dense."""

    def __init__(self) -> None:
        warn_of_old_name()
        super().__init__()


def warn_of_old_name() -> None:
    """Log the new name of the option."""
    logger.warning_once("--quantization %s is now called --quantization %s", OLD_METHOD, METHOD)
