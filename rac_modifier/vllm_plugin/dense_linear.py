"""A linear layer of vLLM whose weight is dense and of 2 to 4 bits (W4A16), on our kernel or by vLLM's own method.

What can be decided from numbers is decided before loading: vLLM's own method then gets the layer as if this package were not
there. Otherwise the parts are collected, checked and cut as those of sparse layers are (linear.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from rac_modifier.checkpoint.stored_weight import StoredWeight, stack
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import choose
from rac_modifier.kernels.interface import Decision, Layer
from rac_modifier.vllm_plugin import METHOD
from rac_modifier.vllm_plugin.packed_weight import PackedWeight
from rac_modifier.vllm_plugin.shards import CodeShards
from rac_modifier.vllm_plugin.summary import Summary

logger = init_logger(f"vllm.{__name__}")
_DEVICE = "cpu"  # the one whose backend multiplies dense weights of few bits


def by_vllm(reason: str) -> Decision:
    """The decision that vLLM's own method runs a layer."""
    return Decision(False, "vLLM", f"vLLM's own method because {reason}", 1.0, 1.0)


def record(summary: Summary, layer: str, decision: Decision) -> None:
    """Add a layer's decision to `summary`; after the last one, log it, and whether the request had any effect."""
    text = summary.add(layer, decision)
    if text is None:
        return
    if any(other.sparse for other in summary.decisions.values()):
        logger.info("%s", text)
    else:
        logger.warning(
            "%s\n  --quantization %s has no effect on this model here; leave it out", text, METHOD
        )


def record_when_loaded(
    method: QuantizeMethodBase, summary: Summary, prefix: str, reason: str
) -> QuantizeMethodBase:
    """vLLM's own method of a layer, which adds the `reason` why vLLM runs it to `summary` when the layer has been loaded."""
    finish = method.process_weights_after_loading

    def finish_and_record(layer: torch.nn.Module) -> None:
        finish(layer)
        record(summary, prefix, by_vllm(reason))

    method.process_weights_after_loading = finish_and_record
    summary.expect()
    return method


@register_weight_loader_v2_supported_method
class DenseCodesLinearMethod(LinearMethodBase):
    """The method of one layer. `inner` is vLLM's own for the same layer."""

    def __init__(
        self,
        shards: CodeShards,
        inner: LinearMethodBase,
        summary: Summary,
        activation_bits: int = 16,
    ) -> None:
        self.shards, self.inner, self.summary = shards, inner, summary
        self.activation_bits = activation_bits
        self.vllms: Decision | None = None
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
        """Register the parameters that collect the parts, or those of vLLM's method.

        Raises:
            RacError: neither our kernel nor vLLM's method runs the layer.
        """
        self.loader: Callable[..., None] = extra_weight_attrs["weight_loader"]
        self.rows, self.columns, self.all_columns = (
            sum(output_partition_sizes),
            input_size_per_partition,
            input_size,
        )
        self.dtype = params_dtype
        reason = self._why_not(torch.empty(0).device.type)  # vLLM sets the default device
        if reason is None:
            self.shards.register(layer, params_dtype)
            return
        self.vllms = by_vllm(reason)
        sizes = (
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
        )
        try:
            self.inner.create_weights(layer, *sizes, **extra_weight_attrs)
        except ValueError as error:
            raise RacError(
                f"{self.shards.prefix}: the int{self.shards.bits} kernel does not run it because {reason}, and vLLM's own method "
                f"does not either ({error}); quantize it in groups of 32, 64 or 128 columns"
            ) from error

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check what was collected, cut out the rank's share and pack it for the kernel."""
        if self.vllms is not None:
            self.inner.process_weights_after_loading(layer)
            record(self.summary, self.shards.prefix, self.vllms)
            return
        stored = self.shards.take(layer)
        rows = self.shards.row_numbers(layer, self.loader, stored, self.rows)
        share = stack(
            [weight for weight in stored.values() if isinstance(weight, StoredWeight)],
            self.shards.prefix,
        )
        share = share.select_rows(rows)
        if self.columns < self.all_columns:
            share = share.select_columns(getattr(layer, "tp_rank", 0) * self.columns, self.columns)
        share = replace(share, activation_bits=self.activation_bits)
        decision, backend = choose(Layer.of(share, self.dtype), _DEVICE)
        if backend is None:  # `_why_not` has asked for a weight of at least as many bytes
            raise RacError(
                f"{self.shards.prefix}: {decision.reason}; leave out --quantization {METHOD}, and report this"
            )
        self.packed = PackedWeight(layer, backend, share, self.dtype)
        record(self.summary, self.shards.prefix, decision)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] to [..., N]."""
        if self.packed is None:
            return self.inner.apply(layer, x, bias)
        return self.packed.linear(layer, x, bias)

    def _why_not(self, device: str) -> str | None:
        """Why the kernel does not run this rank's share; None where it does."""
        if device != _DEVICE:
            return f"there is no dense int{self.shards.bits} kernel for {device}"
        whole = self.shards.group or self.all_columns
        if self.all_columns % whole:
            return f"its {self.all_columns} columns are no multiple of its groups of {whole}"
        group = math.gcd(whole, self.columns)
        if group < self.columns and group % 4:  # the backend would round such values to bfloat16
            return f"its groups have {group} columns on a rank, no multiple of 4"
        zeros = not self.shards.symmetric
        sizes = Layer(
            *(self.rows, self.columns, 1.0, torch.int32, self.dtype, group, 4 + zeros),
            zero_points=zeros,
            word_bits=self.shards.bits,
        )  # scales are known after loading: 4 bytes at most
        decision, backend = choose(sizes, device)
        return None if backend is not None else decision.reason.removeprefix("dense because ")
