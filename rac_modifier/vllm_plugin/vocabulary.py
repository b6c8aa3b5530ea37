"""A head or an embedding that a checkpoint stores in 8 or 4 bits, on the CPU kernels.

An embedding looks rows up in the packed form that a head multiplies. Tied, they share one copy.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

from rac_modifier.errors import RacError
from rac_modifier.formats.module_names import Role
from rac_modifier.formats.stored_weight import StoredWeight
from rac_modifier.kernels.choose import serve
from rac_modifier.kernels.cpu import lookup
from rac_modifier.kernels.interface import Layer
from rac_modifier.vllm_plugin.linear import PackedWeight, Shards, check_shape, to_floats
from rac_modifier.vllm_plugin.readers import Weight, WeightReader

logger = init_logger(f"vllm.{__name__}")


class VocabularyMethod(QuantizeMethodBase):
    """The method of a head or embedding in 8 or 4 bits; without `reader` tied, or in floats."""

    def __init__(self, prefix: str, reader: WeightReader | None) -> None:
        self.prefix = prefix
        self.shards = None if reader is None else Shards(prefix, [prefix], reader)
        self.floats = UnquantizedEmbeddingMethod()
        self.packed: PackedWeight | None = None
        self.tied: torch.nn.Module | None = None  # the embedding that a head is tied to

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters that collect the tensors, or create a weight in floats."""
        self.rows, self.columns, self.dtype = sum(output_partition_sizes), input_size, params_dtype
        self.device = torch.empty(0).device  # vLLM sets the default device
        if self.shards is not None:
            self.shards.register(layer, params_dtype)
            return
        sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size)
        self.floats.create_weights(layer, *sizes, params_dtype, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was collected (RacError), then keep it packed; without a kernel, in floats."""
        loaded = {} if self.shards is None else self.shards.take(layer)
        if loaded:
            (weight,) = loaded.values()
            self._pack(layer, weight)
            return
        if self.shards is not None and self.tied is None:
            raise RacError(f"{self.prefix}: the checkpoint lacks its weight; copy or save it again")
        method = getattr(self.tied, "quant_method", None)
        if self.tied is None or not isinstance(method, VocabularyMethod) or method.packed is None:
            self._keep_floats(layer)
            return
        if hasattr(layer, "weight"):
            del layer.weight
        for name in method.packed.names:
            layer.register_parameter(name, self.tied.get_parameter(name))
        self.packed = method.packed
        self._stand_in(layer)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Tie a head to an embedding. A packed weight is shared after both have been loaded."""
        self.tied = embed_tokens
        if hasattr(embed_tokens, "weight"):
            layer.weight = embed_tokens.weight
        return layer

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the logits of x [..., K]."""
        if self.packed is None:
            return self.floats.apply(layer, x, bias)
        rows = self.packed.rows
        logits = self.packed.linear(layer, x, None if bias is None else bias[:rows])
        missing = layer.num_embeddings_per_partition - rows  # vLLM pads a vocabulary
        return torch.nn.functional.pad(logits, (0, missing)) if missing else logits

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """Return the rows of these ids: [..., K]."""
        if self.packed is None:
            return self.floats.embedding(layer, input_)
        packed = self.packed.parameters(layer)
        return lookup(input_, packed, self.packed.rows, self.packed.columns, layer.params_dtype)

    def _pack(self, layer: Any, weight: Weight) -> None:
        """Pack this rank's rows of a stored weight, or expand them to floats."""
        check_shape(self.prefix, weight, layer.org_vocab_size, self.columns)
        shard = layer.shard_indices
        rows = torch.arange(shard.org_vocab_start_index, shard.org_vocab_end_index)
        backend = None
        # a rank may have nothing but rows that pad the vocabulary
        if isinstance(weight, StoredWeight) and len(rows):
            share = weight.select_rows(rows)
            numbers = Layer.of(share, self.dtype)
            role = Role.HEAD if isinstance(layer, ParallelLMHead) else Role.EMBEDDING
            decision, backend = serve(share, numbers, self.device.type, role)
            stored = (self.prefix, share.bits, decision.reason)
            logger.info("%s: int%d from the checkpoint: %s", *stored)
        if backend is not None:
            self.packed = PackedWeight(layer, backend, share, self.dtype)
            self._stand_in(layer)
            return
        floats = to_floats(weight, self.dtype)[rows]
        padding = (0, 0, 0, self.rows - len(floats))
        self._keep_floats(layer, torch.nn.functional.pad(floats, padding).to(self.device))

    def _stand_in(self, layer: torch.nn.Module) -> None:
        """Give LoRA and drafts the dtype, device and width that they read of a `weight`."""
        layer.weight = torch.empty(0, self.columns, dtype=self.dtype, device=self.device)

    def _keep_floats(self, layer: torch.nn.Module, weight: Tensor | None = None) -> None:
        """Leave the weight to vLLM's method: `weight`, the tied embedding's, or the layer's own."""
        if weight is not None:
            layer.register_parameter("weight", Parameter(weight, requires_grad=False))
        elif self.tied is not None:
            layer.weight = self.tied.weight
        self.floats.process_weights_after_loading(layer)
