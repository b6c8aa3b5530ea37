"""An output head or an embedding that is kept in 8 or 4 bits on a CPU: what rounded ones and those from a checkpoint share.

A head is multiplied by the int8 or int4 kernel, and an embedding looks rows up in the same packed form. Where both are tied,
they share one copy.
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
from rac_modifier.kernels.cpu.lookup import lookup
from rac_modifier.kernels.interface import Backend
from rac_modifier.vllm_plugin.packed_weight import PackedWeight

logger = init_logger(f"vllm.{__name__}")


class VocabularyMethod(QuantizeMethodBase):
    """The method of one head or embedding. Where there is no kernel, vLLM's own method runs it in floats."""

    def __init__(self) -> None:
        self.plain = UnquantizedEmbeddingMethod()
        self.packed: PackedWeight | None = None
        self.tied: torch.nn.Module | None = None  # the embedding that a head is tied to

    def create_weights(
        self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any
    ) -> None:
        """As for a weight in floats."""
        self.plain.create_weights(layer, *weight_args, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Of a head that is stored in floats: share the packed weight of the embedding that it is tied to, if it has one."""
        if not self.shares(layer):
            self.keep_plain(layer)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Tie a head to an embedding; where that is kept in 8 or 4 bits, when both have been loaded."""
        self.tied = embed_tokens
        if hasattr(embed_tokens, "weight"):
            layer.weight = embed_tokens.weight
        return layer

    def shares(self, layer: torch.nn.Module) -> bool:
        """Take the packed weight of the embedding that this head is tied to; False where it has none."""
        method = getattr(self.tied, "quant_method", None)
        if self.tied is None or not isinstance(method, VocabularyMethod) or method.packed is None:
            return False
        if hasattr(layer, "weight"):
            del layer.weight
        for name in method.packed.names:
            layer.register_parameter(name, self.tied.get_parameter(name))
        self.packed = method.packed
        return True

    def keep_packed(
        self, layer: torch.nn.Module, backend: Backend, stored: StoredWeight, dtype: torch.dtype
    ) -> None:
        """Pack a weight for the kernels; a float weight of the layer is dropped."""
        if hasattr(layer, "weight"):
            del layer.weight
        self.packed = PackedWeight(layer, backend, stored, dtype)

    def keep_plain(self, layer: torch.nn.Module, weight: Tensor | None = None) -> None:
        """Leave the weight to vLLM's method, in floats: this one, that of the tied embedding, or the layer's own."""
        if weight is not None:
            layer.register_parameter("weight", Parameter(weight, requires_grad=False))
        elif self.tied is not None:
            layer.weight = self.tied.weight
        self.plain.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of x [..., K]."""
        return self._apply(layer, *args, **kwargs)

    def _apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.packed is None:
            return self.plain.apply(layer, x, bias)
        return self.packed.linear(layer, x, bias)

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """The rows of these ids: [..., K]."""
        if self.packed is None:
            return self.plain.embedding(layer, input_)
        packed = {name: getattr(layer, name) for name in self.packed.names}
        return lookup(input_, packed, self.packed.rows, self.packed.columns, layer.params_dtype)
