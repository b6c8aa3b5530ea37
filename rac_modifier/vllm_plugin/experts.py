"""The experts of a mixture-of-experts layer whose weights are compressed in the checkpoint.

Tensors are collected while weights are loaded. Afterwards they are checked, the rank's share is cut
out, and all experts of the layer run on a kernel, or dense.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.utils import set_weight_attrs

from rac_modifier.errors import RacError
from rac_modifier.formats.module_names import Role
from rac_modifier.formats.stored_weight import StoredWeight, stack
from rac_modifier.kernels.choose import serve
from rac_modifier.kernels.interface import Decision, Layer, stay_dense
from rac_modifier.vllm_plugin.linear import AddDecision, check_shape, loaded_again, to_floats
from rac_modifier.vllm_plugin.packed_experts import PackedExperts, PackedLinear
from rac_modifier.vllm_plugin.readers import Weight, WeightReader

_GATES: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: torch.nn.functional.silu,
    MoEActivation.GELU: torch.nn.functional.gelu,
    MoEActivation.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


class RacExpertsMethod(FusedMoEMethodBase):
    """The method of the experts of one layer; `add` records its decision."""

    def __init__(self, layer: Any, prefix: str, reader: WeightReader, add: AddDecision) -> None:
        super().__init__(layer.moe_config)
        self.prefix, self.reader, self.add = prefix, reader, add
        self._tensors: dict[str, dict[str, Tensor]] = {}  # by module, such as "3.up_proj"
        self._unpacked: list[tuple[str, Tensor]] = []
        self._finished = False
        self._load, layer.load_weights = layer.load_weights, self._collect

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Allocate nothing: the tensors stay mapped from the files until they are packed.

        Models that load experts themselves, such as DeepSeek's, look parameters up by name.
        """
        for part, stored in self.reader.dtypes.items():
            for name in (f"w13_{part}", f"w2_{part}"):
                empty = torch.empty(0, dtype=stored or params_dtype)
                parameter = torch.nn.Parameter(empty, requires_grad=False)
                set_weight_attrs(parameter, {"weight_loader": self._collector(layer, part)})
                layer.register_parameter(name, parameter)
        sizes = {"num_experts": num_experts, "params_dtype": params_dtype}
        self.sizes = sizes | extra_weight_attrs
        self.width, self.dtype = intermediate_size_per_partition, params_dtype
        self.device = torch.empty(0).device  # vLLM sets the default device

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Configure none of vLLM's own kernels."""
        return

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was collected (RacError), and keep it in one form, packed or dense."""
        self._finished = True
        for part in self.reader.dtypes:
            delattr(layer, f"w13_{part}")
            delattr(layer, f"w2_{part}")
        reason = self._unsupported(layer)
        decision = stay_dense(reason, self.dtype) if reason else self._pack(layer)
        if not decision.sparse:
            self._expand(layer)
        self._tensors = {}
        self.add(self.prefix, decision)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Run x [T, hidden] through the experts of each token. vLLM runs shared experts."""
        return layer.sparse_experts(x, topk_weights, topk_ids)

    def _collect(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Store what is loaded, such as ("3.up_proj.bitmask", tensor), in several calls."""
        if self._finished:
            raise loaded_again(self.prefix)
        for name, tensor in weights:
            module, _, part = name.rpartition(".")
            if part in self.reader.dtypes and module.partition(".")[0].isdecimal():
                self._tensors.setdefault(module, {})[part] = tensor
            else:
                self._unpacked.append((name, tensor))
        return iter(())

    def _collector(self, layer: Any, part: str) -> Callable[..., bool]:
        def collect(
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            names = (layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name)
            module = f"{expert_id}.{names[int(shard_id[1]) - 1]}"
            self._collect([(f"{module}.{part}", loaded_weight)])
            return True

        return collect

    def _unsupported(self, layer: Any) -> str | None:
        """Return why no kernel runs experts of such a layer; None where one can."""
        moe = layer.moe_config
        if self._unpacked:
            return f"its experts have {self._unpacked[0][0]}, which is not packed"
        if layer.activation not in _GATES or layer.swiglu_limit is not None:
            return f"experts with the activation {layer.activation.value} have no kernel"
        weighted, balanced = layer.apply_router_weight_on_input, moe.moe_parallel_config.enable_eplb
        if moe.has_bias or moe.is_lora_enabled or weighted or balanced:
            return "experts with biases, LoRA, weighted inputs or load balancing have no kernel"
        return None

    def _pack(self, layer: Any) -> Decision:
        """Decide for the rank's experts, and pack one after the other while a kernel runs all.

        Read for packing, a weight takes several times its bytes on disk.
        """
        up: list[PackedLinear] = []
        down: list[PackedLinear] = []
        for number in self._numbers(layer):
            shares = self._shares(layer, number)
            if isinstance(shares, str):
                return stay_dense(shares, self.dtype)
            for share, linears in zip(shares, (up, down), strict=True):
                layer_of_share = Layer.of(share, self.dtype)
                decision, backend = serve(share, layer_of_share, self.device.type, Role.EXPERT)
                if backend is None:
                    return decision
                linears.append(PackedLinear(backend, share, self.dtype))
        gate, local = _GATES[layer.activation], layer.expert_map_manager.expert_map
        layer.sparse_experts = PackedExperts(self.prefix, up, down, gate, local)
        return replace(decision, kernel=f"{decision.kernel}, experts")

    def _numbers(self, layer: Any) -> list[int]:
        """Return the checkpoint's numbers of this rank's experts, in local order."""
        local = layer.expert_map_manager.expert_map
        if local is None:
            return list(range(layer.global_num_experts))
        numbers = torch.nonzero(local >= 0).flatten()
        return numbers[local[numbers].argsort()].tolist()

    def _shares(self, layer: Any, number: int) -> tuple[StoredWeight, StoredWeight] | str:
        """Return this rank's rows of gate and up, stacked, and its columns of down (RacError).

        A text is the reason why the experts run dense.
        """
        moe = layer.moe_config
        wide = (moe.intermediate_size, moe.hidden_dim)
        weights = [
            self._weight(f"{number}.{name}", shape)
            for name, shape in (
                (layer.ckpt_gate_proj_name, wide),
                (layer.ckpt_up_proj_name, wide),
                (layer.ckpt_down_proj_name, wide[::-1]),
            )
        ]
        packed = [weight for weight in weights if isinstance(weight, StoredWeight)]
        if len(packed) < len(weights):
            return "some of its experts are stored in floats"
        gate, up, down = packed
        first = moe.tp_rank * self.width
        rows = torch.arange(first, first + self.width)
        try:
            both = stack([gate.select_rows(rows), up.select_rows(rows)], f"{self.prefix}.{number}")
            return both, down.select_columns(first, self.width)
        except RacError as error:  # gate and up differ
            return str(error)

    def _weight(self, name: str, shape: tuple[int, int]) -> Weight:
        """Read a weight, such as "3.up_proj", of a shape (RacError: missing, or unfit)."""
        module = f"{self.prefix}.{name}"
        if name not in self._tensors:
            raise RacError(f"{module}: missing from the checkpoint; copy or save it again")
        weight = self.reader.read(self._tensors[name], module)
        check_shape(module, weight, *shape)
        return weight

    def _expand(self, layer: Any) -> None:
        """Have vLLM's own method run the experts, dense, created with the sizes that it needs."""
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
        weights = (
            (name, self.reader.read(stored, f"{self.prefix}.{name}"))
            for name, stored in self._tensors.items()
        )
        dense = ((f"{name}.weight", to_floats(weight, self.dtype)) for name, weight in weights)
        for _ in self._load(chain(self._unpacked, dense)):  # expands one expert at a time
            pass
        method.process_weights_after_loading(layer)
