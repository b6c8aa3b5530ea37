"""A linear layer of vLLM whose weight comes packed from the checkpoint.

Loading collects the parts of each shard as they are. Afterwards they are checked, the rank's share is cut out, and one
decision sends the layer to the sparse kernel or, expanded, to the method that vLLM has for a dense weight.
"""

from __future__ import annotations

from collections.abc import Callable
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

from rac_modifier import kernels
from rac_modifier.checkpoint.stored_weight import StoredWeight, stack
from rac_modifier.errors import RacError
from rac_modifier.kernels.plan import Summary, form_of, stay_dense
from rac_modifier.vllm_plugin.shards import ShardId, Shards, load_shard

logger = init_logger(f"vllm.{__name__}")


@register_weight_loader_v2_supported_method
class RacSparseLinearMethod(LinearMethodBase):
    """The method of one layer; `inner` is what vLLM would do with a dense weight, quantised or not.

    Quantised weights stay as they are where a kernel takes them. Dense, they become floats, except where `inner` is vLLM's
    method for quantised ones.
    """

    def __init__(self, shards: Shards, inner: LinearMethodBase, summary: Summary) -> None:
        self.shards, self.inner, self.summary = shards, inner, summary
        self.as_quantized = not isinstance(inner, UnquantizedLinearMethod)
        self.dense: Parameter | None = None
        self.sparse = False
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
        """Register what collects the packed parts; nothing of the weight's size is allocated unless it is quantised."""
        self.loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        self.device = torch.empty(0).device  # vLLM sets the default one
        self.dtype = params_dtype
        self.rows, self.columns, self.all_columns = sum(output_partition_sizes), input_size_per_partition, input_size
        self.sizes = (input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype)
        self.attributes = extra_weight_attrs
        if self.as_quantized:  # its scales are loaded beside the packed weight
            self.dense = self._create_dense(layer)
        self.shards.register(layer, params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check what was collected, decide, and keep the weight in one form, packed or dense."""
        stored = self.shards.take(layer)
        rows = self.shards.row_numbers(layer, self.loader, stored, self.rows)
        decision, weight = self._decide(list(stored.values()), rows, getattr(layer, "tp_rank", 0))
        if weight is not None and decision.sparse:
            self._pack(layer, weight)
        else:
            self._expand(layer, stored)
        text = self.summary.add(self.shards.prefix, decision)
        if text is not None:
            logger.info("%s", text)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] to [..., N]."""
        if not self.sparse:
            return self.inner.apply(layer, x, bias)
        if x.dtype == torch.float16:  # the kernels read bf16 and fp32
            return self._product(layer, x.float(), None if bias is None else bias.float()).half()
        return self._product(layer, x, bias)

    def _product(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        # What kernels.sparse_linear calls; a SparseWeight, checked by native code, cannot be made in a traced function.
        return torch.ops.rac_modifier.sparse_linear(
            x, layer.weight_packed, self.rows, self.columns, bias, layer.weight_packed_scale
        )

    def _pack(self, layer: torch.nn.Module, weight: StoredWeight) -> None:
        form = form_of(weight.values.dtype, weight.group, weight.columns, self.dtype)
        if weight.scale is not None and not form.scaled:
            weight = weight.floats(form.dtype)
        packed = kernels.pack(weight.values.to(form.dtype), weight.bitmask, weight.columns)
        scale = kernels.pack_scale(weight.scale, weight.group) if weight.scale is not None else None
        # Parameters, so that memory accounting and torch.compile see them; LoRA knows the name.
        layer.register_parameter("weight_packed", Parameter(packed.data, requires_grad=False))
        layer.register_parameter(
            "weight_packed_scale", Parameter(scale, requires_grad=False) if scale is not None else None
        )
        self.sparse = True

    def _decide(
        self, stored: list[StoredWeight | Tensor], rows: Tensor, rank: int
    ) -> tuple[kernels.Decision, StoredWeight | None]:
        """The decision for this rank's share, and that share where a kernel could take it."""
        if self.device.type != "cpu" or self.as_quantized:
            return stay_dense(f"there is no sparse kernel for {self.device.type} yet", self.dtype), None
        sparse = [weight for weight in stored if isinstance(weight, StoredWeight)]
        if len(sparse) < len(stored):
            return stay_dense("a part of this fused layer is stored dense", self.dtype), None
        if len({(weight.values.dtype, weight.group) for weight in sparse}) > 1:
            return stay_dense("the parts of this fused layer are quantised differently", self.dtype), None
        support = kernels.support()
        if support.isa is None:
            return stay_dense(support.reason, self.dtype), None
        mine = stack(sparse, self.shards.prefix).select_rows(rows)
        if self.columns < self.all_columns:
            mine = mine.select_columns(rank * self.columns, self.columns)
        form = form_of(mine.values.dtype, mine.group, mine.columns, self.dtype)
        return kernels.choose(self.rows, self.columns, mine.density, form.dtype, support, form.note, self.dtype), mine

    def _create_dense(self, layer: Any) -> Parameter:
        """Let vLLM's method create its parameters, and take the weight out again."""
        with self.device:
            self.inner.create_weights(layer, *self.sizes, **self.attributes)
        weight = getattr(layer, "weight", None)
        if weight is None:
            raise RacError(
                f"{self.shards.prefix}: config.json quantises it to a layout without a plain weight, which cannot be "
                "packed sparse; save the model with storage: dense"
            )
        del layer.weight
        return weight

    def _expand(self, layer: Any, stored: dict[ShardId, StoredWeight | Tensor]) -> None:
        """Hand the weight, dense, to the method that vLLM has for it."""
        layer.register_parameter("weight", self.dense if self.dense is not None else self._create_dense(layer))
        self.dense = None
        layer.update_param_tp_status()
        for shard, weight in stored.items():
            if isinstance(weight, StoredWeight):
                weight = weight.dense() if self.as_quantized else weight.dequantized(self.dtype)
            load_shard(self.loader, layer.weight, weight, shard)
        self.inner.process_weights_after_loading(layer)
