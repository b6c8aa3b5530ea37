"""An lm_head of int8 on request: unpruned, it is a large part of what a decode step reads.

RAC_LM_HEAD=int8 rounds each row of the head to 255 levels while it is loaded, and multiplies it on an int8 kernel without
masks: one byte per weight. An embedding that is tied to the head stays as it is.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from rac_modifier.checkpoint.stored_weight import all_stored, quantize_rows
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import choose
from rac_modifier.kernels.interface import Layer
from rac_modifier.vllm_plugin.packed_weight import PackedWeight

logger = init_logger(f"vllm.{__name__}")
VARIABLE = "RAC_LM_HEAD"


def wants_int8() -> bool:
    """Whether the environment requests it.

    Raises:
        RacError: it requests something else.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted not in (None, "int8"):
        raise RacError(f'{VARIABLE}="{wanted}": the head can be int8; unset it to leave the head as it is stored')
    return wanted is not None


class Int8HeadMethod(QuantizeMethodBase):
    """Loads a head as vLLM does, then keeps it as int8. Where there is no kernel, vLLM's own method runs it."""

    def __init__(self) -> None:
        self.plain = UnquantizedEmbeddingMethod()
        self.packed: PackedWeight | None = None

    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """As for a head in floats."""
        self.plain.create_weights(layer, *weight_args, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Quantize, or log why not. A tied weight is not freed, since the embedding holds it too."""
        weight: Tensor = layer.get_parameter("weight")
        rows, columns = weight.shape
        decision, backend = choose(
            Layer(rows, columns, 1.0, torch.int8, weight.dtype, group=columns), weight.device.type
        )
        if backend is None:
            logger.info("%s=int8: the head stays as it is stored: %s", VARIABLE, decision.reason)
            self.plain.process_weights_after_loading(layer)
            return
        values, scale = quantize_rows(weight.data)
        stored = replace(all_stored(values, "lm_head"), scale=scale)
        del layer.weight
        self.packed = PackedWeight(layer, backend, stored, weight.dtype)
        logger.info("%s=int8: the head [%d, %d] runs on the %s", VARIABLE, rows, columns, decision.reason)

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of x [..., K]."""
        return self._apply(layer, *args, **kwargs)

    def _apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.packed is None:
            return self.plain.apply(layer, x, bias)
        return self.packed.linear(layer, x, bias)
