"""An lm_head of int8 on request: unpruned, it is a large part of what a decode step reads.

RAC_LM_HEAD=int8 rounds each row of the head to 255 levels while it is loaded, and multiplies it on the int8 kernel, without
masks: a byte a weight. An embedding that is tied to the head stays as it is.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from rac_modifier import kernels
from rac_modifier.checkpoint.stored_weight import quantize_rows
from rac_modifier.errors import RacError

logger = init_logger(f"vllm.{__name__}")
VARIABLE = "RAC_LM_HEAD"


def wants_int8() -> bool:
    """Whether the environment asks for it.

    Raises:
        RacError: it asks for something else.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted not in (None, "int8"):
        raise RacError(f'{VARIABLE}="{wanted}": the head can be int8; unset it to leave the head as it is stored')
    return wanted is not None


class Int8HeadMethod(QuantizeMethodBase):
    """Loads a head as vLLM does, then keeps it as int8; vLLM's own method runs it where there is no kernel."""

    def __init__(self) -> None:
        self.plain = UnquantizedEmbeddingMethod()
        self.int8 = False

    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """As for a head in floats."""
        self.plain.create_weights(layer, *weight_args, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Quantize, or say why not. A tied weight lives on in the embedding, which holds it too."""
        weight = layer.weight
        isa = kernels.support().isa
        if weight.device.type != "cpu" or isa in (None, "portable"):
            why = (
                kernels.support().reason if weight.device.type == "cpu" else f"no int8 kernel for {weight.device.type}"
            )
            logger.info("%s=int8: the head stays as it is, because %s", VARIABLE, why)
            self.plain.process_weights_after_loading(layer)
            return
        self.rows, self.columns = weight.shape
        values, scale = quantize_rows(weight.data)
        packed = kernels.pack_dense(values)
        del layer.weight
        layer.register_parameter("weight_packed", Parameter(packed.data, requires_grad=False))
        layer.register_parameter("weight_packed_scale", Parameter(kernels.pack_scale(scale), requires_grad=False))
        self.int8 = True
        logger.info("%s=int8: the head [%d, %d] runs on the int8 kernel %s", VARIABLE, self.rows, self.columns, isa)

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of x [..., K]."""
        return self._apply(layer, *args, **kwargs)

    def _apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.int8:
            return self.plain.apply(layer, x, bias)
        if x.dtype == torch.float16:  # the kernels read bf16 and fp32
            return self._apply(layer, x.float(), None if bias is None else bias.float()).half()
        return torch.ops.rac_modifier.sparse_linear(
            x, layer.weight_packed, self.rows, self.columns, bias, layer.weight_packed_scale
        )
