"""A linear layer of vLLM whose weight comes packed from the checkpoint.

While weights are loaded, the parts of each shard are only collected. Afterwards they are checked, the rank's share is cut
out, and one decision is made: the layer runs on a sparse kernel, or it is expanded and runs by vLLM's own method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from rac_modifier.checkpoint.stored_weight import StoredWeight, stack
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import choose, has_backend, no_backend
from rac_modifier.kernels.interface import Backend, Decision, Layer, stay_dense
from rac_modifier.vllm_plugin.packed_weight import PackedWeight
from rac_modifier.vllm_plugin.shards import ShardId, Shards, load_shard
from rac_modifier.vllm_plugin.summary import Summary

logger = init_logger(f"vllm.{__name__}")


@register_weight_loader_v2_supported_method
class RacSparseLinearMethod(LinearMethodBase):
    """The method of one layer. `inner` is vLLM's own method for the same weight stored dense, quantized or not.

    Quantized weights stay quantized on a sparse kernel. Dense, they become floats, except where `inner` is vLLM's method for
    quantized weights. `activation_bits`: what a kernel of integers may round activations to.
    """

    def __init__(
        self, shards: Shards, inner: LinearMethodBase, summary: Summary, activation_bits: int = 16
    ) -> None:
        self.shards, self.inner, self.summary = shards, inner, summary
        self.activation_bits = activation_bits
        self.as_quantized = not isinstance(inner, UnquantizedLinearMethod)
        self.dense: Parameter | None = None
        self.packed: PackedWeight | None = None
        summary.expect()

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
        """Register the parameters that collect the packed parts. Only `inner`'s quantized weights are allocated already."""
        self.loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        self.device = torch.empty(0).device  # vLLM sets the default device
        self.dtype = params_dtype
        self.rows, self.columns, self.all_columns = (
            sum(output_partition_sizes),
            input_size_per_partition,
            input_size,
        )
        self.sizes = (
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
        )
        self.attributes = extra_weight_attrs
        if self.as_quantized:  # its scales are loaded beside the packed weight
            self.dense = self._create_dense(layer)
        self.shards.register(layer, params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check what was collected, decide, and keep the weight in one form, packed or dense."""
        stored = self.shards.take(layer)
        rows = self.shards.row_numbers(layer, self.loader, stored, self.rows)
        decision, backend, share = self._decide(
            list(stored.values()), rows, getattr(layer, "tp_rank", 0)
        )
        if backend is not None and share is not None:
            self.packed = PackedWeight(layer, backend, share, self.dtype)
        else:
            self._expand(layer, stored)
        text = self.summary.add(self.shards.prefix, decision)
        if text is not None:
            logger.info("%s", text)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] to [..., N]."""
        if self.packed is None:
            return self.inner.apply(layer, x, bias)
        return self.packed.linear(layer, x, bias)

    def _decide(
        self, stored: list[StoredWeight | Tensor], rows: Tensor, rank: int
    ) -> tuple[Decision, Backend | None, StoredWeight | None]:
        """The decision for this rank's share, with the backend and the share if they are needed."""
        if not has_backend(self.device.type) or self.as_quantized:
            return no_backend(self.device.type, self.dtype), None, None
        sparse = [weight for weight in stored if isinstance(weight, StoredWeight)]
        if len(sparse) < len(stored):
            return stay_dense("a part of this fused layer is stored dense", self.dtype), None, None
        if len({(weight.values.dtype, weight.bits, weight.group) for weight in sparse}) > 1:
            return (
                stay_dense("the parts of this fused layer are quantized differently", self.dtype),
                None,
                None,
            )
        share = stack(sparse, self.shards.prefix).select_rows(rows)
        if self.columns < self.all_columns:
            share = share.select_columns(rank * self.columns, self.columns)
        share = replace(share, activation_bits=self.activation_bits)
        return *choose(Layer.of(share, self.dtype), self.device.type), share

    def _create_dense(self, layer: Any) -> Parameter:
        """Create the parameters of vLLM's method, then remove the weight from the layer and return it."""
        with self.device:
            self.inner.create_weights(layer, *self.sizes, **self.attributes)
        weight = getattr(layer, "weight", None)
        if weight is None:
            raise RacError(
                f"{self.shards.prefix}: config.json quantizes it to a layout without a plain weight, which cannot be "
                "packed sparse; save the model with storage: dense"
            )
        del layer.weight
        return weight

    def _expand(self, layer: Any, stored: dict[ShardId, StoredWeight | Tensor]) -> None:
        """Give the dense weight to vLLM's own method."""
        layer.register_parameter(
            "weight", self.dense if self.dense is not None else self._create_dense(layer)
        )
        self.dense = None
        layer.update_param_tp_status()
        for shard, weight in stored.items():
            if isinstance(weight, StoredWeight):
                weight = weight.dense() if self.as_quantized else weight.dequantized(self.dtype)
            load_shard(self.loader, layer.weight, weight, shard)
        self.inner.process_weights_after_loading(layer)
