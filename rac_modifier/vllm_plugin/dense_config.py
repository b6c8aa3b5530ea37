"""With `--quantization rac`, dense checkpoints of compressed-tensors of 2 to 4 bits (W4A16) run on our kernels.

The config is vLLM's own for compressed-tensors, so whatever has no kernel here is served as without this package; only the
methods of linear layers of 2 to 4 bits are replaced. Imported when such a checkpoint is served: vLLM has loaded its layers by
then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from rac_modifier.checkpoint import dense_codes
from rac_modifier.checkpoint.dense_codes import BITS, OF_VOCABULARY
from rac_modifier.checkpoint.files import check_index
from rac_modifier.checkpoint.quantization_config import PACK_QUANTIZED
from rac_modifier.checkpoint.sparsity_config import RAC_KEY, SparsityRecord
from rac_modifier.errors import RacError
from rac_modifier.vllm_plugin import METHOD
from rac_modifier.vllm_plugin.activations import activation_bits, check_effect
from rac_modifier.vllm_plugin.crossover import crossovers, use_crossovers
from rac_modifier.vllm_plugin.dense_linear import DenseCodesLinearMethod, logger, record_when_loaded
from rac_modifier.vllm_plugin.shards import CodeShards
from rac_modifier.vllm_plugin.sparse_layers import fused_modules, stored_name
from rac_modifier.vllm_plugin.stored_vocabulary import VocabularyMethods, why_not
from rac_modifier.vllm_plugin.summary import Summary

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper


class DenseCodesConfig(CompressedTensorsConfig):
    """vLLM's config of a compressed-tensors checkpoint with weights of 2 to 4 bits and `--quantization rac`.

    `int8_activations`: the modules whose inputs may be rounded to 8 bits, from `maybe_update_config` on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.crossovers: dict[str, float] = {}
        self.int8_activations: tuple[str, ...] = ()
        self.summary = Summary(layers="quantized layers")
        self.vocabulary = VocabularyMethods()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DenseCodesConfig:
        """From the checkpoint's `quantization_config`.

        Raises:
            RacError: it has no weights that the kernels read, so the option would have no effect.
        """
        made: DenseCodesConfig = super().from_config(config)
        reasons = [
            (why_not if OF_VOCABULARY.search(target) else why_not_codes)(scheme, made.quant_format)
            for target, scheme in made.target_scheme_map.items()
        ]
        if None not in reasons:
            raise RacError(
                f"--quantization {METHOD}: this checkpoint is neither packed sparse nor dense int4, int3 or int2 "
                f"({reasons[0] if reasons else 'it quantizes nothing'}), so the option has no effect; leave it out"
            )
        kinds = sorted(
            {scheme["weights"].num_bits for scheme in made.target_scheme_map.values()} & {*BITS},
            reverse=True,
        )
        made.summary.kernel = f"an {' or '.join(f'int{bits}' for bits in kinds or BITS)} kernel"
        return made

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """vLLM calls this once before it loads anything, with the checkpoint's folder or its name on the hub.

        Raises:
            RacError: the folder lacks a tensor of its index, which vLLM notices in unquantized models only; or `rac_sparsity`
                in its config.json is malformed.
        """
        from vllm.platforms import current_platform

        check_index(model_name)
        recorded = SparsityRecord.of({RAC_KEY: getattr(hf_config, RAC_KEY, None)})
        self.int8_activations = recorded.int8_activations
        check_effect(integers=True, on_cpu=current_platform.is_cpu())
        if current_platform.is_cpu():
            self.crossovers = crossovers(
                ("int4",), activation_bits(bool(self.int8_activations)) == 8
            )
        if recorded.modules:
            logger.info(
                "this checkpoint is pruned, but stored dense; pack it with `rac pack` for the sparse kernels"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename modules as vLLM does."""
        super().apply_vllm_mapper(hf_to_vllm_mapper)
        mapped = {name: hf_to_vllm_mapper.map_name(name) for name in self.int8_activations}
        self.int8_activations = tuple(new or old for old, new in mapped.items())

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """vLLM's method of one layer, or ours: for a linear layer of 2 to 4 bits, and for a head or embedding of int8 or int4."""
        prefix = stored_name(prefix)
        use_crossovers(self.crossovers)
        if isinstance(layer, VocabParallelEmbedding):
            return self._of_vocabulary(layer, prefix)
        method = super().get_quant_method(layer, prefix)
        if not isinstance(layer, (LinearBase, RoutedExperts)):
            return method
        if method is None or isinstance(
            method, (UnquantizedLinearMethod, UnquantizedFusedMoEMethod)
        ):
            return method
        reason = self._why_not(layer, prefix, method)
        if reason is not None:
            return record_when_loaded(method, self.summary, prefix, reason)
        weights = layer.scheme
        group = None if weights.strategy == "channel" else weights.group_size
        modules = fused_modules(prefix, self.packed_modules_mapping)
        shards = CodeShards(prefix, modules, group, bool(weights.symmetric), weights.num_bits)
        bits = activation_bits(set(modules) <= set(self.int8_activations))
        return DenseCodesLinearMethod(shards, method, self.summary, bits)

    def _of_vocabulary(
        self, layer: VocabParallelEmbedding, prefix: str
    ) -> QuantizeMethodBase | None:
        """The method of a head or an embedding; vLLM's own for a quantized one is recorded with the reason."""
        vllms = super().get_quant_method
        method = self.vocabulary.choose(layer, prefix, self, lambda: vllms(layer, prefix))
        scheme = self.get_scheme_dict(layer, prefix)
        reason = None if scheme is None else why_not(scheme, self.quant_format)
        return (
            method
            if method is None or reason is None
            else record_when_loaded(method, self.summary, prefix, reason)
        )

    def _why_not(self, layer: Any, prefix: str, method: QuantizeMethodBase) -> str | None:
        """Why vLLM runs a quantized layer, from config.json alone; None where the kernel may run it."""
        if isinstance(layer, RoutedExperts):
            return "dense experts of few bits have no kernel"
        scheme = self.get_scheme_dict(layer, prefix)
        reason = None if scheme is None else why_not_codes(scheme, self.quant_format)
        if reason is not None:
            return reason
        if type(method) is not CompressedTensorsLinearMethod:
            return "its inputs or outputs are transformed"
        modules = fused_modules(prefix, self.packed_modules_mapping)
        if len({_kind(self.get_scheme_dict(layer, module)) for module in modules}) > 1:
            return "the parts of this fused layer are quantized differently"
        return None


def why_not_codes(scheme: Mapping[str, Any], format: str | None) -> str | None:
    """Why no kernel of ours reads weights of a `scheme` of vLLM's target_scheme_map; None where it does.

    `format`: that of the checkpoint, for a scheme without one of its own.
    """
    weights = scheme["weights"].model_dump(mode="json")  # names in place of enums
    activations = (
        scheme.get("input_activations") is not None or scheme.get("output_activations") is not None
    )
    own = scheme.get("format") or format
    return dense_codes.why_not_codes(
        weights["type"], weights["num_bits"], weights["strategy"], own, activations=activations
    )


def _kind(scheme: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    """What the parts of a fused layer must share."""
    if scheme is None:
        return None
    weights = scheme["weights"]
    reason = why_not_codes(scheme, PACK_QUANTIZED)
    return weights.num_bits, weights.strategy, weights.group_size, weights.symmetric, reason
