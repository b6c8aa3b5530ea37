"""An lm_head of int8 or int4 on request: unpruned, it is a large part of what a decode step reads.

RAC_LM_HEAD=int8 rounds each row of the head to 255 levels while it is loaded, and multiplies it on an int8 kernel without
masks: one byte per weight. RAC_LM_HEAD=int4 rounds groups of 128 columns (or 64, or 32) to 16 levels: 0.52 bytes per weight.
The log has the error of the weights. An embedding that is tied to the head stays as it is.
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

from rac_modifier.checkpoint.round_to_nearest import quantize_groups, quantize_rows
from rac_modifier.checkpoint.stored_weight import all_stored, dequantize
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import choose
from rac_modifier.kernels.interface import Layer
from rac_modifier.vllm_plugin.packed_weight import PackedWeight

logger = init_logger(f"vllm.{__name__}")
VARIABLE = "RAC_LM_HEAD"
_GROUPS = (128, 64, 32)  # columns that share a scale of int4: the first that divides the head's columns


def wanted_bits() -> int | None:
    """Bits of the head that the environment requests; None where it requests nothing.

    Raises:
        RacError: it requests something else.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted not in (None, "int8", "int4"):
        raise RacError(
            f'{VARIABLE}="{wanted}": the head can be int8 or int4; unset it to leave the head as it is stored'
        )
    return None if wanted is None else int(wanted[3:])


class RoundedHeadMethod(QuantizeMethodBase):
    """Loads a head as vLLM does, then keeps it in 8 or 4 bits. Where there is no kernel, vLLM's own method runs it."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.plain = UnquantizedEmbeddingMethod()
        self.packed: PackedWeight | None = None

    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """As for a head in floats."""
        self.plain.create_weights(layer, *weight_args, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Quantize, or log why not. A tied weight is not freed, since the embedding holds it too."""
        weight: Tensor = layer.get_parameter("weight")
        rows, columns = weight.shape
        group = columns if self.bits == 8 else self._group(columns)
        stored_as = torch.int8 if self.bits == 8 else torch.int32
        group_bytes = 4 if self.bits == 8 else 2
        decision, backend = choose(
            Layer(rows, columns, 1.0, stored_as, weight.dtype, group, group_bytes), weight.device.type
        )
        if backend is None:
            logger.info("%s=int%d: the head stays as it is stored: %s", VARIABLE, self.bits, decision.reason)
            self.plain.process_weights_after_loading(layer)
            return
        values, scale = quantize_rows(weight.data) if self.bits == 8 else quantize_groups(weight.data, group)
        stored = replace(all_stored(values, "lm_head"), scale=scale, bits=self.bits)
        error = _relative_error(weight.data, values, scale)
        del layer.weight
        self.packed = PackedWeight(layer, backend, stored, weight.dtype)
        logger.info(
            "%s=int%d: the head [%d, %d] runs on the %s; rounding changed its weights by %.1f %% of their norm",
            *(VARIABLE, self.bits, rows, columns, decision.reason, 100 * error),
        )

    @staticmethod
    def _group(columns: int) -> int:
        group = next((group for group in _GROUPS if columns % group == 0), None)
        if group is None:
            raise RacError(f"{VARIABLE}=int4: the head has {columns} columns, no multiple of 32; use {VARIABLE}=int8")
        return group

    def apply(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of x [..., K]."""
        return self._apply(layer, *args, **kwargs)

    def _apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.packed is None:
            return self.plain.apply(layer, x, bias)
        return self.packed.linear(layer, x, bias)


def _relative_error(weight: Tensor, values: Tensor, scale: Tensor) -> float:
    """||W - Q|| / ||W||, of at most 4,096 rows, evenly spaced."""
    rows = slice(None, None, -(-len(weight) // 4096))
    exact = weight[rows].float()
    return float((dequantize(values[rows], scale[rows], torch.float32) - exact).norm() / exact.norm())
