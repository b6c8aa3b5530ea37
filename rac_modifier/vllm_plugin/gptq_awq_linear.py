"""A linear layer of vLLM whose weight is stored as GPTQ or AWQ do, on our kernel or by vLLM's own method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.parameter import BasevLLMParameter

from rac_modifier.checkpoint.gptq_awq import ORDER, PARTS, Ordered
from rac_modifier.checkpoint.stored_weight import StoredWeight
from rac_modifier.errors import RacError
from rac_modifier.vllm_plugin.dense_linear import DenseCodesLinearMethod, record_when_loaded
from rac_modifier.vllm_plugin.shards import CodeShards, ShardId
from rac_modifier.vllm_plugin.summary import Summary

Reader = Callable[
    [Mapping[str, Tensor], str], Ordered
]  # of the tensors of the module with this name


class GptqAwqShards(CodeShards):
    """The shards of one layer, all of one kind, read by `reader`. `orders`: of each module, that of its columns."""

    def __init__(
        self,
        prefix: str,
        modules: list[str],
        group: int | None,
        symmetric: bool,
        bits: int,
        reader: Reader,
    ) -> None:
        super().__init__(prefix, modules, group, symmetric, bits)
        self.reader = reader
        self.orders: dict[str, Tensor | None] = {}
        self._names = (*PARTS, "weight")

    def _checked(self, shard: ShardId, parts: dict[str, Tensor]) -> StoredWeight:
        if "weight" in parts:
            return super()._checked(shard, parts)  # which refuses it
        name = self.name(shard)
        weight, self.orders[name] = self.reader(parts, name)
        return weight

    def order(self) -> Tensor | None:
        """The order of the columns, int64 [K]; None where it is that of the inputs.

        Raises:
            RacError: the shards have different orders.
        """
        first, *others = self.orders
        for other in others:
            if not _same(self.orders[first], self.orders[other]):
                raise RacError(
                    f"{other}.{ORDER}: its columns are in another order than those of {first}, and both are multiplied at once; "
                    "quantize the model with desc_act: false"
                )
        return self.orders[first]


@register_weight_loader_v2_supported_method
class GptqAwqLinearMethod(DenseCodesLinearMethod):
    """As `DenseCodesLinearMethod`; where columns are reordered (`desc_act`), the inputs are reordered too."""

    shards: GptqAwqShards
    reordered = False

    def create_weights(
        self, layer: torch.nn.Module, *sizes: Any, **extra_weight_attrs: Any
    ) -> None:
        """Register the parameters that collect the parts, or those of vLLM's method.

        Raises:
            RacError: neither our kernel nor vLLM's method runs the layer.
        """
        super().create_weights(layer, *sizes, **extra_weight_attrs)
        if self.vllms is not None:
            _check_order_of(layer, self.shards.prefix)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Pack the rank's share, and keep the order of its columns.

        Raises:
            RacError: the columns are reordered, and ranks would share them; or as for other dense weights.
        """
        if self.vllms is not None:
            delattr(layer, ORDER)
        super().process_weights_after_loading(layer)
        order = None if self.packed is None else self.shards.order()
        if order is None:
            return
        if self.columns < self.all_columns:
            raise RacError(
                f"{self.shards.prefix}: its columns are reordered ({ORDER}, desc_act: true), and a rank that has {self.columns} "
                f"of {self.all_columns} would need parts of all groups; serve it with --tensor-parallel-size 1"
            )
        layer.register_parameter("column_order", Parameter(order, requires_grad=False))
        self.reordered = True

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] to [..., N]."""
        if self.reordered:
            x = x.index_select(-1, layer.get_parameter("column_order"))
        return super().apply(layer, x, bias)


class RefusedByVllm(LinearMethodBase):
    """In place of vLLM's own method, where vLLM refuses to make one."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def create_weights(
        self, layer: torch.nn.Module, *sizes: Any, **extra_weight_attrs: Any
    ) -> None:
        """Raise vLLM's reason, as methods of vLLM do that cannot run a layer."""
        raise ValueError(self.reason)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Never called: a layer without weights is not served."""
        raise AssertionError(self.reason)


def left_to_vllm(
    method: QuantizeMethodBase, summary: Summary, prefix: str, reason: str
) -> QuantizeMethodBase:
    """vLLM's method of one layer, which records the `reason` in `summary` when the layer has been loaded.

    Its `create_weights` raises a RacError with both reasons where vLLM does not run the layer either.
    """
    record_when_loaded(method, summary, prefix, reason)
    create, finish = method.create_weights, method.process_weights_after_loading

    def create_or_refuse(layer: torch.nn.Module, *sizes: Any, **extra_weight_attrs: Any) -> None:
        try:
            create(layer, *sizes, **extra_weight_attrs)
        except ValueError as error:
            raise refused(prefix, reason, error) from error
        _check_order_of(layer, prefix)

    def finish_without_order(layer: torch.nn.Module) -> None:
        delattr(layer, ORDER)
        finish(layer)

    method.create_weights, method.process_weights_after_loading = (
        create_or_refuse,
        finish_without_order,
    )
    return method


def refused(prefix: str, reason: str, error: object) -> RacError:
    """The error for a layer that neither we nor vLLM run."""
    return RacError(
        f"{prefix}: no kernel of this package runs it because {reason}, and vLLM does not either ({error}); serve the model on a "
        "GPU, or take a checkpoint whose linear layers alone are quantized, to 4 bits"
    )


def _check_order_of(layer: torch.nn.Module, prefix: str) -> None:
    """Have the order of columns of a layer that vLLM's method runs checked when it is loaded: the method would ignore it."""

    def check(param: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
        if bool((loaded_weight[1:] < loaded_weight[:-1]).any()):
            raise RacError(
                f"{prefix}.{ORDER}: its columns are reordered, and vLLM's own method, which runs it here, ignores that; take "
                "a checkpoint with desc_act: false"
            )

    layer.register_parameter(
        ORDER, BasevLLMParameter(data=torch.empty(0, dtype=torch.int32), weight_loader=check)
    )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)
