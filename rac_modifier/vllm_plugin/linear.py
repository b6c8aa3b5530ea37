"""A linear layer of vLLM whose weight is compressed in the checkpoint, whatever its format.

While weights are loaded, the tensors of each shard are only collected. Afterwards they are checked,
the rank's share is cut out, and one decision is made: the layer runs on a kernel, or dense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from rac_modifier.checkpoint.stored_weight import StoredWeight, stack
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import choose
from rac_modifier.kernels.interface import Backend, Decision, Layer, stay_dense
from rac_modifier.vllm_plugin.load_report import LoadReport
from rac_modifier.vllm_plugin.readers import LoadedWeight
from rac_modifier.vllm_plugin.shards import ShardId, Shards

_Loaded = dict[ShardId, LoadedWeight]


class PackedWeight:
    """A weight in the layout of `backend`, kept in parameters of `layer`.

    Memory accounting and torch.compile find them there. `served` is the dtype of the activations.
    """

    def __init__(
        self, layer: torch.nn.Module, backend: Backend, weight: StoredWeight, served: torch.dtype
    ) -> None:
        self.rows, self.columns = weight.rows, weight.columns
        packed = backend.pack(weight, served)
        self.names = tuple(packed)
        for name, tensor in packed.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))
        self.backend = backend

    def parameters(self, layer: Any) -> dict[str, Tensor]:
        """Return the layer's packed parameters by name. vLLM may have replaced the objects."""
        return {name: getattr(layer, name) for name in self.names}

    def linear(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply x [..., K]: [..., N]."""
        return self.backend.linear(x, self.parameters(layer), self.rows, self.columns, bias)


@register_weight_loader_v2_supported_method
class RacLinearMethod(LinearMethodBase):
    """The method of one layer.

    A kernel of integers may round its inputs to `activation_bits`, 16 or 8.
    """

    def __init__(self, shards: Shards, report: LoadReport, activation_bits: int = 16) -> None:
        self.shards, self.report = shards, report
        self.activation_bits = activation_bits
        self.dense = UnquantizedLinearMethod()
        self.packed: PackedWeight | None = None
        self.reordered = False
        report.expect()

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
        """Register the parameters that collect the tensors on disk. No weight is allocated."""
        self.loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        self.device = torch.empty(0).device  # vLLM sets the default device
        self.dtype = params_dtype
        self.rows = sum(output_partition_sizes)
        self.columns, self.all_columns = input_size_per_partition, input_size
        self.sizes = (
            *(input_size_per_partition, output_partition_sizes, input_size, output_size),
            params_dtype,
        )
        self.attributes = extra_weight_attrs
        self.shards.register(layer, params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check what was collected, decide, and keep the weight in one form, packed or dense.

        Raises:
            RacError: a tensor is damaged or missing, or does not fit the model.
        """
        loaded = self.shards.take(layer)
        rows = self.shards.row_numbers(layer, self.loader, loaded, self.rows)
        order = self.shards.order(loaded)
        decision, backend, share = self._decide(layer, list(loaded.values()), rows, order)
        if backend is not None and share is not None:
            self.packed = PackedWeight(layer, backend, share, self.dtype)
            if order is not None:
                layer.register_parameter("column_order", Parameter(order, requires_grad=False))
                self.reordered = True
        else:
            with self.device:
                self.dense.create_weights(layer, *self.sizes, **self.attributes)
            layer.get_parameter("weight").data.copy_(self._dense_weight(layer, loaded, rows))
            self.dense.process_weights_after_loading(layer)
        in_floats = all(isinstance(item.weight, Tensor) for item in loaded.values())
        self.report.add(self.shards.prefix, None if in_floats else decision)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply x [..., K]: [..., N]."""
        if self.packed is None:
            return self.dense.apply(layer, x, bias)
        if self.reordered:
            x = x.index_select(-1, layer.get_parameter("column_order"))
        return self.packed.linear(layer, x, bias)

    def dequantize_weight(self, layer: torch.nn.Module) -> Tensor:
        """Return this rank's dense weight [N, K], instead of `process_weights_after_loading`.

        vLLM calls it to quantize the weight anew (`--quantization rac` with an online scheme).

        Raises:
            RacError: the layer is processed already, or its tensors are damaged.
        """
        if not hasattr(layer, next(iter(self.shards.reader.parts))):
            raise RacError(f"{self.shards.prefix}: its weight is packed for a kernel already")
        loaded = self.shards.take(layer)
        rows = self.shards.row_numbers(layer, self.loader, loaded, self.rows)
        return self._dense_weight(layer, loaded, rows).to(self.device)

    def _decide(
        self, layer: Any, loaded: list[LoadedWeight], rows: Tensor, order: Tensor | None
    ) -> tuple[Decision, Backend | None, StoredWeight | None]:
        """Return the decision for this rank's share.

        With the backend and the share where a kernel runs it.
        """
        compressed = [item.weight for item in loaded if isinstance(item.weight, StoredWeight)]
        kinds = {(w.values.dtype, w.bits, w.group, w.zeros is None) for w in compressed}
        reason = None
        if len(compressed) < len(loaded):
            reason = "a part of this fused layer is stored dense"
        elif len(kinds) > 1:
            reason = "the parts of this fused layer are quantized differently"
        elif order is not None and self.columns < self.all_columns:
            reason = "its columns are reordered (desc_act), and ranks share them"
        if reason is not None:
            return stay_dense(reason, self.dtype), None, None
        share = stack(compressed, self.shards.prefix).select_rows(rows)
        if self.columns < self.all_columns:
            share = share.select_columns(getattr(layer, "tp_rank", 0) * self.columns, self.columns)
        if (
            share.density == 1.0
            and share.bits < 8
            and share.group < share.columns
            and share.group % 4
        ):
            # The backend would round such values to bfloat16.
            reason = f"its groups have {share.group} columns on a rank, no multiple of 4"
            return stay_dense(reason, self.dtype), None, None
        share = replace(share, activation_bits=self.activation_bits)
        return *choose(Layer.of(share, self.dtype), self.device.type), share

    def _dense_weight(self, layer: Any, loaded: _Loaded, rows: Tensor) -> Tensor:
        first = (
            getattr(layer, "tp_rank", 0) * self.columns if self.columns < self.all_columns else 0
        )
        dense = [weight.dense(self.dtype) for weight in loaded.values()]
        whole = dense[0] if len(dense) == 1 else torch.cat(dense)
        return whole[rows, first : first + self.columns]
