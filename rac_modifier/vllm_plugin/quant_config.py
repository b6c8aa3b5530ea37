"""The quantization config that vLLM asks for each layer's method. vLLM's layers are imported when it first does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from rac_modifier.checkpoint.files import INDEX_FILE, TensorFiles
from rac_modifier.errors import RacError
from rac_modifier.vllm_plugin.register import METHOD
from rac_modifier.vllm_plugin.sparse_layers import (
    SparseLayers,
    fused_modules,
    is_claimed,
    is_in_words,
    is_quantized,
    parse_dense_stored,
    parse_packed,
)

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

    from rac_modifier.kernels.plan import Summary


class RacSparseConfig(QuantizationConfig):
    """Packed sparse checkpoints; and, with `--quantization rac-sparse`, pruned ones that are stored dense.

    `layers` says what is stored sparse; None until `maybe_update_config` has read it from a dense-stored checkpoint's
    config. `quantized` is vLLM's own config for weights that are quantised besides, `in_words` where that holds several
    values to an int32.
    """

    def __init__(
        self,
        layers: SparseLayers | None = None,
        quantized: QuantizationConfig | None = None,
        in_words: bool = False,
    ) -> None:
        super().__init__()
        from rac_modifier.kernels.plan import Summary

        self.layers = layers
        self.quantized = quantized
        self.in_words = in_words
        self.summary: Summary = Summary()

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim packed sparse checkpoints and nothing else; called for every quantised model that vLLM loads."""
        return METHOD if is_claimed(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RacSparseConfig:
        """From the checkpoint's `quantization_config`."""
        if not is_claimed(config):
            raise RacError(
                f"--quantization {METHOD}: this checkpoint is quantised by {config.get('quant_method')!r} and not packed "
                "sparse; leave the option out"
            )
        quantized = None
        if is_quantized(config):
            from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
                CompressedTensorsConfig,
            )

            # vLLM refuses any sparsity_config, so its config is given the quantised part alone.
            quantized = CompressedTensorsConfig.from_config({k: v for k, v in config.items() if k != "sparsity_config"})
        return cls(parse_packed(config), quantized, is_in_words(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Called once before anything is loaded, with the folder or the hub's name of the checkpoint.

        Without a `quantization_config` its weights are stored dense, and `rac_sparsity` says which are pruned.

        Raises:
            RacError: the folder lacks a tensor that its index promises. vLLM asks that of unquantised models only, and would
                serve, say, an embedding that was never filled.
        """
        if (Path(model_name) / INDEX_FILE).is_file():
            TensorFiles(model_name).close()
        if self.layers is None:
            self.layers = parse_dense_stored(getattr(hf_config, "rac_sparsity", None))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename modules as vLLM renames them."""
        assert self.layers is not None
        mapped = {name: hf_to_vllm_mapper.map_name(name) for name in self.layers.names}
        self.layers = self.layers.renamed({old: new for old, new in mapped.items() if new is not None})
        if self.quantized is not None:
            self.quantized.apply_vllm_mapper(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; None leaves embeddings, lm_head and attention to vLLM."""
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from rac_modifier.vllm_plugin.experts import expand_experts
        from rac_modifier.vllm_plugin.head import Int8HeadMethod, wants_int8
        from rac_modifier.vllm_plugin.linear import RacSparseLinearMethod
        from rac_modifier.vllm_plugin.shards import Shards

        assert self.layers is not None
        if isinstance(layer, LinearBase):
            modules = fused_modules(prefix, self.packed_modules_mapping)
            if not any(self.layers.holds(module) for module in modules):
                return self._inner(layer, prefix) or UnquantizedLinearMethod()
            # Quantised weights that have no kernel here are vLLM's to run, dense, unless it wants them in words.
            ours = self.quantized is None or self.in_words or _has_kernels()
            inner = None if ours else self._inner(layer, prefix)
            scales = "none" if self.quantized is None else "ours" if ours else "vllm's"
            shards = Shards(prefix, modules, self.layers.format, scales)
            return RacSparseLinearMethod(shards, inner or UnquantizedLinearMethod(), self.summary)
        inner = self._inner(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return expand_experts(layer, prefix, self.layers, inner, self.summary)
        if inner is None and isinstance(layer, ParallelLMHead) and wants_int8():
            return Int8HeadMethod()
        return inner

    def _inner(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What vLLM would do, were nothing sparse."""
        if self.quantized is None:
            return None
        self.quantized.packed_modules_mapping = self.packed_modules_mapping
        return self.quantized.get_quant_method(layer, prefix)

    def get_name(self) -> str:
        """The method's name."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: layers run dense there, and say so."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: without a `quantization_config` vLLM makes an empty config, which `maybe_update_config` fills."""
        return []


def _has_kernels() -> bool:
    """Whether there are kernels for the device that layers are made on, vLLM's default one."""
    return torch.empty(0).device.type == "cpu"
