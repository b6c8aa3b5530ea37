"""The packed experts of a mixture-of-experts layer, each run on the tokens that are routed to it.

Tensors are collected while weights are loaded. Afterwards they are checked, the rank's share is cut
out, and all experts of the layer run on a kernel, in one opaque torch operator, or dense.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.utils import set_weight_attrs

from rac_modifier.checkpoint.stored_weight import StoredWeight, stack
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import choose
from rac_modifier.kernels.interface import REORDERED, Decision, Layer, stay_dense
from rac_modifier.vllm_plugin.layouts import WeightReader
from rac_modifier.vllm_plugin.linear import AddDecision, PackedWeight, loaded_again, to_floats

_GATES: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: torch.nn.functional.silu,
    MoEActivation.GELU: torch.nn.functional.gelu,
    MoEActivation.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
_SERVED: WeakValueDictionary[str, "PackedExperts"] = WeakValueDictionary()


class PackedExperts(torch.nn.Module):
    """Experts, each with the weights [2 width, hidden] (gate and up, stacked) and [hidden, width].

    The operator finds them by their layer's `name`. `pairs`: the packed weights of expert after
    expert, each with the module that holds its parameters. `local`, int [experts], has numbers on
    this rank or -1; None: the same.
    """

    def __init__(
        self,
        name: str,
        pairs: Sequence[tuple[PackedWeight, torch.nn.Module]],
        gate: Callable[[Tensor], Tensor],
        local: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.local = gate, local
        self.holders = torch.nn.ModuleList(holder for _, holder in pairs)
        self.up, self.down = pairs[::2], pairs[1::2]
        self.name, number = name, 1
        while self.name in _SERVED:  # another model in this process has a layer of this name
            number += 1
            self.name = f"{name}#{number}"
        _SERVED[self.name] = self

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Run x [T, hidden] through the experts `topk_ids` [T, k], weighted by `topk_weights`."""
        return torch.ops.rac_modifier.sparse_experts(x, topk_weights, topk_ids, self.name)

    def _forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        # Sort the pairs of a token and an expert by expert.
        k = topk_ids.shape[1]
        ids = (topk_ids if self.local is None else self.local[topk_ids.long()]).flatten()
        order = ids.argsort(stable=True)
        numbers, counts = (
            column.tolist() for column in torch.unique_consecutive(ids[order], return_counts=True)
        )
        # Run each expert on its tokens.
        gate_up = _matmuls(x[order // k], numbers, counts, self.up)
        gate, up = gate_up.float().chunk(2, dim=1)
        results = _matmuls((self.gate(gate) * up).to(x.dtype), numbers, counts, self.down)
        # Sum by token, in float32 and in the token's order.
        by_token = torch.empty_like(results)
        by_token[order] = results
        out = torch.zeros(x.shape, dtype=torch.float32)
        for place, shares in enumerate(topk_weights.float().unbind(1)):
            out += by_token[place::k] * shares[:, None]
        return out.to(x.dtype)


def _matmuls(
    x: Tensor,
    numbers: list[int],
    counts: list[int],
    packed: Sequence[tuple[PackedWeight, torch.nn.Module]],
) -> Tensor:
    """Multiply each expert with its rows of `x`, which follow each other; zeros for number -1."""
    out = x.new_zeros(len(x), packed[0][0].rows)
    first = 0
    for number, count in zip(numbers, counts, strict=True):
        last = first + count
        if number >= 0:
            weight, holder = packed[number]
            out[first:last] = weight.linear(holder, x[first:last], None)
        first = last
    return out


def _run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, name: str) -> Tensor:
    return _SERVED[name]._forward(x, topk_weights, topk_ids)


_OPERATOR = "rac_modifier::sparse_experts"
if not hasattr(torch.ops.rac_modifier, "sparse_experts"):  # once per process
    arguments = "Tensor x, Tensor topk_weights, Tensor topk_ids, str name"
    torch.library.define(_OPERATOR, f"({arguments}) -> Tensor")
    torch.library.impl(_OPERATOR, "cpu", _run)
    torch.library.register_fake(_OPERATOR, lambda x, weights, ids, name: torch.empty_like(x))


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
        pairs = []
        for number in self._numbers(layer):
            weights = self._weights(layer, number)
            if not all(isinstance(weight, StoredWeight) for weight in weights):
                return stay_dense("some of its experts are stored in floats", self.dtype)
            if any(weight.order is not None for weight in weights):
                return stay_dense(REORDERED, self.dtype)
            try:
                shares = self._shares(layer, weights, number)
            except RacError as error:  # gate and up differ
                return stay_dense(str(error), self.dtype)
            for share in shares:
                decision, backend = choose(Layer.of(share, self.dtype), self.device.type)
                if backend is None:
                    return decision
                holder = torch.nn.Module()
                pairs.append((PackedWeight(holder, backend, share, self.dtype), holder))
        gate, local = _GATES[layer.activation], layer.expert_map_manager.expert_map
        layer.sparse_experts = PackedExperts(self.prefix, pairs, gate, local)
        return replace(decision, kernel=f"{decision.kernel}, experts")

    def _numbers(self, layer: Any) -> list[int]:
        """Return the checkpoint's numbers of this rank's experts, in local order."""
        local = layer.expert_map_manager.expert_map
        if local is None:
            return list(range(layer.global_num_experts))
        numbers = torch.nonzero(local >= 0).flatten()
        return numbers[local[numbers].argsort()].tolist()

    def _weights(self, layer: Any, number: int) -> list[Any]:
        """Return an expert's gate, up and down, read from the checkpoint (RacError: unfit)."""
        moe = layer.moe_config
        wide = [moe.intermediate_size, moe.hidden_dim]
        shapes = dict.fromkeys((layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name), wide)
        shapes[layer.ckpt_down_proj_name] = wide[::-1]
        weights = []
        for name, shape in shapes.items():
            module, stored = f"{self.prefix}.{number}.{name}", f"{number}.{name}"
            if stored not in self._tensors:
                raise RacError(f"{module}: missing from the checkpoint; copy or save it again")
            weight = self.reader.read(self._tensors[stored], module)
            if list(weight.shape) != shape:
                raise RacError(
                    f"{module}: the checkpoint has a weight {list(weight.shape)}, the model's "
                    f"config.json has {shape}; they do not belong together"
                )
            weights.append(weight)
        return weights

    def _shares(
        self, layer: Any, weights: Sequence[StoredWeight], number: int
    ) -> tuple[StoredWeight, StoredWeight]:
        """Return this rank's rows of gate and up, stacked, and its columns of down."""
        gate, up, down = weights
        first = layer.moe_config.tp_rank * self.width
        rows = torch.arange(first, first + self.width)
        gate_up = stack([gate.select_rows(rows), up.select_rows(rows)], f"{self.prefix}.{number}")
        return gate_up, down.select_columns(first, self.width)

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
