"""The experts of a mixture-of-experts layer, each packed, and each run on the tokens that are routed to it.

While weights are loaded, the parts of each expert are only collected. Afterwards they are checked, the rank's share is cut
out, and one decision is made for all experts of the layer: they run on a sparse kernel, or vLLM's method runs all of them, dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from rac_modifier.checkpoint.stored_weight import StoredWeight, stack
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import choose
from rac_modifier.kernels.interface import Decision, Layer, stay_dense
from rac_modifier.vllm_plugin.packed_experts import PackedExperts
from rac_modifier.vllm_plugin.shards import checked, loaded_again, parts_of
from rac_modifier.vllm_plugin.summary import Summary

logger = init_logger(f"vllm.{__name__}")

_GATES: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: torch.nn.functional.silu,
    MoEActivation.GELU: torch.nn.functional.gelu,
    MoEActivation.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


class SparseExpertsMethod(FusedMoEMethodBase):
    """The method of the experts of one layer, packed as `format`; `scales` as for `Shards`: "ours" or "none".

    Scales of activations are not used, as in linear layers.
    """

    def __init__(self, layer: Any, prefix: str, format: str, scales: str, summary: Summary) -> None:
        super().__init__(layer.moe_config)
        self.prefix, self.format, self.scales, self.summary = prefix, format, scales, summary
        self._parts: dict[str, dict[str, Tensor]] = {}
        self._others: list[tuple[str, Tensor]] = []
        self._taken = False
        self._load, layer.load_weights = layer.load_weights, self._collect
        summary.expect()

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Nothing is allocated: the parts stay mapped from the files until they are packed."""
        self.sizes = {
            "num_experts": num_experts,
            "params_dtype": params_dtype,
            **extra_weight_attrs,
        }
        self.width, self.dtype = intermediate_size_per_partition, params_dtype
        self.device = torch.empty(0).device  # vLLM sets the default device

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: none of vLLM's own kernels is configured."""
        return

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was collected, decide, and keep the experts in one form, packed or dense.

        Raises:
            RacError: naming a tensor that is damaged or missing, or does not fit the model.
        """
        parts, self._parts, self._taken = self._parts, {}, True
        stored = {
            name: checked(found, self.format, self.scales, f"{self.prefix}.{name}")
            for name, found in parts.items()
        }
        reason = self._unsupported(layer, stored)
        decision = stay_dense(reason, self.dtype) if reason else self._pack(layer, stored)
        if not decision.sparse:
            self._expand(layer, stored)
        text = self.summary.add(self.prefix, decision)
        if text is not None:
            logger.info("%s", text)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """x [T, hidden] through the experts `topk_ids` [T, k] of each token, weighted: [T, hidden]. vLLM runs shared experts."""
        return layer.sparse_experts(x, topk_weights, topk_ids)

    def _collect(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Keep what is loaded, such as ("3.up_proj.bitmask", tensor), by module. vLLM calls it several times."""
        if self._taken:
            raise loaded_again(self.prefix)
        names = parts_of(self.format, self.scales)
        for name, tensor in weights:
            module, _, part = name.rpartition(".")
            if part in names and module.partition(".")[0].isdecimal():
                self._parts.setdefault(module, {})[part] = tensor
            else:
                self._others.append((name, tensor))
        return iter(())

    def _unsupported(self, layer: Any, stored: dict[str, StoredWeight | Tensor]) -> str | None:
        """Why this layer cannot run here, whatever the kernels can do."""
        moe = layer.moe_config
        if self._others:
            return f"its experts have {self._others[0][0]}, which is not packed"
        if any(isinstance(weight, Tensor) for weight in stored.values()):
            return "some of its experts are stored dense"
        if layer.activation not in _GATES or layer.swiglu_limit is not None:
            return f"experts with the activation {layer.activation.value} have no sparse kernel"
        if (
            moe.has_bias
            or moe.is_lora_enabled
            or layer.apply_router_weight_on_input
            or moe.moe_parallel_config.enable_eplb
        ):
            return (
                "experts with biases, LoRA, weighted inputs or load balancing have no sparse kernel"
            )
        return None

    def _pack(self, layer: Any, stored: dict[str, StoredWeight | Tensor]) -> Decision:
        """The decision for the rank's experts; where it is sparse, they are packed into parameters of the layer."""
        experts = [self._share(layer, stored, number) for number in self._numbers(layer)]
        chosen = []
        for share in (share for pair in experts for share in pair):
            decision, backend = choose(Layer.of(share, self.dtype), self.device.type)
            if backend is None:
                return decision
            chosen.append((decision, backend, share))
        parts = [(backend, share) for _, backend, share in chosen]
        layer.sparse_experts = PackedExperts(
            self.prefix,
            list(zip(parts[::2], parts[1::2], strict=True)),
            _GATES[layer.activation],
            self.dtype,
            layer.expert_map_manager.expert_map,
        )
        weights = [share.rows * share.columns for _, _, share in chosen]
        bytes_ = sum(
            d.bytes_per_weight * n for (d, _, _), n in zip(chosen, weights, strict=True)
        ) / sum(weights)
        return replace(
            chosen[0][0], kernel=f"{chosen[0][0].kernel}, experts", bytes_per_weight=bytes_
        )

    def _numbers(self, layer: Any) -> list[int]:
        """The experts of this rank, by their numbers in the checkpoint, in the order of their local numbers."""
        local = layer.expert_map_manager.expert_map
        if local is None:
            return list(range(layer.global_num_experts))
        places = local.tolist()
        return sorted(
            (number for number, place in enumerate(places) if place >= 0),
            key=lambda number: places[number],
        )

    def _share(
        self, layer: Any, stored: dict[str, StoredWeight | Tensor], number: int
    ) -> tuple[StoredWeight, StoredWeight]:
        """This rank's rows of the gate and up projections, stacked, and its columns of the down projection."""
        moe = layer.moe_config
        names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
        found = []
        for name in names:
            weight = stored.get(f"{number}.{name}")
            shape = (
                [moe.hidden_dim, moe.intermediate_size]
                if name == names[2]
                else [moe.intermediate_size, moe.hidden_dim]
            )
            if not isinstance(weight, StoredWeight):
                raise RacError(
                    f"{self.prefix}.{number}.{name}: missing from the checkpoint; copy or save it again"
                )
            if [weight.rows, weight.columns] != shape:
                raise RacError(
                    f"{weight.name}: the checkpoint has a weight [{weight.rows}, {weight.columns}], the model's config.json "
                    f"has {shape}; they do not belong together"
                )
            found.append(weight)
        first = moe.tp_rank * self.width
        rows = torch.arange(first, first + self.width)
        gate, up, down = found
        both = stack([gate.select_rows(rows), up.select_rows(rows)], f"{self.prefix}.{number}")
        return both, down.select_columns(first, self.width)

    def _expand(self, layer: Any, stored: dict[str, StoredWeight | Tensor]) -> None:
        """Have vLLM's own method run the experts, dense: created now, with the sizes that it needs."""
        method, moe = UnquantizedFusedMoEMethod(layer.moe_config), layer.moe_config
        sizes = method.maybe_roundup_sizes(
            layer.hidden_size,
            moe.intermediate_size_per_partition,
            moe.in_dtype,
            moe.moe_parallel_config,
        )
        layer.hidden_size, layer.intermediate_size_per_partition = sizes
        moe.hidden_dim, moe.intermediate_size_per_partition = sizes
        layer._replace_quant_method(method)
        with self.device:
            method.create_weights(
                layer, hidden_size=sizes[0], intermediate_size_per_partition=sizes[1], **self.sizes
            )
        dense = (  # one at a time
            (
                f"{name}.weight",
                weight if isinstance(weight, Tensor) else weight.dequantized(self.dtype),
            )
            for name, weight in stored.items()
        )
        for _ in self._load(chain(self._others, dense)):
            pass
        method.process_weights_after_loading(layer)
