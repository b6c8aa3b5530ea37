"""A head or an embedding that a checkpoint stores in 8 or 4 bits, on the CPU kernels.

An embedding looks rows up in the packed form that a head multiplies. Tied, they share one copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from rac_modifier.checkpoint.stored_weight import StoredWeight
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import choose
from rac_modifier.kernels.cpu import lookup
from rac_modifier.kernels.interface import Layer
from rac_modifier.vllm_plugin.linear import PackedWeight, Shards
from rac_modifier.vllm_plugin.readers import WeightReader

logger = init_logger(f"vllm.{__name__}")


class VocabularyMethod(QuantizeMethodBase):
    """The method of a head in floats that may be tied to an embedding in 8 or 4 bits."""

    def __init__(self) -> None:
        self.floats = UnquantizedEmbeddingMethod()
        self.packed: PackedWeight | None = None
        self.tied: torch.nn.Module | None = None  # the embedding that a head is tied to

    def create_weights(self, layer: torch.nn.Module, *sizes: Any, **attributes: Any) -> None:
        """Create a weight in floats."""
        self.floats.create_weights(layer, *sizes, **attributes)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Share the packed weight of the tied embedding, if it has one."""
        method = getattr(self.tied, "quant_method", None)
        if self.tied is None or not isinstance(method, VocabularyMethod) or method.packed is None:
            self.keep_floats(layer)
            return
        if hasattr(layer, "weight"):
            del layer.weight
        for name in method.packed.names:
            layer.register_parameter(name, self.tied.get_parameter(name))
        self.packed = method.packed

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Tie a head to an embedding. A packed weight is shared after both have been loaded."""
        self.tied = embed_tokens
        if hasattr(embed_tokens, "weight"):
            layer.weight = embed_tokens.weight
        return layer

    def keep_floats(self, layer: torch.nn.Module, weight: Tensor | None = None) -> None:
        """Leave the weight to vLLM's method: `weight`, the tied embedding's, or the layer's own."""
        if weight is not None:
            layer.register_parameter("weight", Parameter(weight, requires_grad=False))
        elif self.tied is not None:
            layer.weight = self.tied.weight
        self.floats.process_weights_after_loading(layer)

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


class StoredMethod(VocabularyMethod):
    """Packs this rank's rows of a stored head or embedding, or expands them to floats."""

    def __init__(self, prefix: str, reader: WeightReader) -> None:
        super().__init__()
        self.shards = Shards(prefix, [prefix], reader)

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
        """Register the parameters that collect the tensors."""
        self.rows, self.columns, self.dtype = sum(output_partition_sizes), input_size, params_dtype
        self.device = torch.empty(0).device  # vLLM sets the default device
        self.shards.register(layer, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was collected (RacError), then keep it packed; without a kernel, in floats."""
        name = self.shards.prefix
        loaded = self.shards.take(layer)
        if not loaded and self.tied is not None:  # only the embedding is on disk
            super().process_weights_after_loading(layer)
            return
        if not loaded:
            raise RacError(f"{name}: the checkpoint lacks its weight; copy or save it again")
        (weight,) = loaded.values()
        if weight.shape != (layer.org_vocab_size, self.columns):
            raise RacError(
                f"{name}: the checkpoint has a weight {list(weight.shape)}, the model's "
                f"config.json has [{layer.org_vocab_size}, {self.columns}]; they do not "
                "belong together"
            )
        shard = layer.shard_indices
        rows = torch.arange(shard.org_vocab_start_index, shard.org_vocab_end_index)
        backend = None
        if isinstance(weight.weight, StoredWeight) and weight.order is None:
            share = weight.weight.select_rows(rows)
            decision, backend = choose(Layer.of(share, self.dtype), self.device.type)
            logger.info("%s: int%d from the checkpoint: %s", name, share.bits, decision.reason)
        if backend is None:
            floats = weight.dense(self.dtype)[rows]
            padding = (0, 0, 0, self.rows - len(floats))
            self.keep_floats(layer, torch.nn.functional.pad(floats, padding).to(self.device))
        else:
            self.packed = PackedWeight(layer, backend, share, self.dtype)
