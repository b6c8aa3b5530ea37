"""A linear layer of vLLM whose weight is compressed in the checkpoint, in any format.

`Shards` collects the tensors. Afterwards they are checked, the rank's rows are cut out, and the
layer runs on a kernel, or dense.
"""

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
from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter

from rac_modifier.errors import RacError, refusing
from rac_modifier.formats.stored_weight import StoredWeight, stack
from rac_modifier.kernels.choose import serve
from rac_modifier.kernels.interface import Backend, Decision, Layer, stay_dense
from rac_modifier.vllm_plugin.readers import Weight, WeightReader

AddDecision = Callable[[str, Decision | None], None]
ShardId = Any  # None (the whole layer), an index, a tuple of indices, or "q", "k", "v"
_Loaded = dict[ShardId, Weight]
_QKV = {"q": 0, "k": 1, "v": 2}


class PackedWeight:
    """A weight in the layout of `backend`, kept in parameters of `layer`."""

    def __init__(
        self, layer: torch.nn.Module, backend: Backend, weight: StoredWeight, served: torch.dtype
    ) -> None:
        self.rows, self.columns, self.backend = weight.rows, weight.columns, backend
        packed = backend.pack(weight, served)
        self.names = tuple(packed)
        for name, tensor in packed.items():
            layer.register_parameter(name, Parameter(tensor, requires_grad=False))

    def parameters(self, layer: Any) -> dict[str, Tensor]:
        """Return the layer's packed parameters by name. vLLM may have replaced the objects."""
        return {name: getattr(layer, name) for name in self.names}

    def linear(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply x [..., K]: [..., N]."""
        return self.backend.linear(x, self.parameters(layer), self.rows, self.columns, bias)


class Shards:
    """Collect what is loaded into a layer with the shards `modules` (names on disk), for `reader`.

    vLLM's own loader cannot cut a packed weight, so it is given row numbers instead of rows.
    """

    def __init__(self, prefix: str, modules: list[str], reader: WeightReader) -> None:
        self.prefix, self.modules, self.reader = prefix, modules, reader
        self._tensors: dict[ShardId, dict[str, Tensor]] = {}
        self._finished = False

    def register(self, layer: Any, dtype: torch.dtype) -> None:
        """Add an empty parameter per tensor name; its loader stores the mapped tensor."""
        for part, stored in self.reader.dtypes.items():
            empty = torch.empty(0, dtype=stored or dtype)
            parameter = BasevLLMParameter(data=empty, weight_loader=self._collector(part))
            layer.register_parameter(part, parameter)

    def take(self, layer: Any) -> _Loaded:
        """Remove these parameters; return each shard's checked weight, in the layer's order."""
        for part in self.reader.dtypes:
            delattr(layer, part)
        tensors, self._tensors, self._finished = self._tensors, {}, True
        return {
            shard: self.reader.read(tensors[shard], self.name(shard))
            for shard in sorted(tensors, key=_position)
        }

    def row_numbers(
        self, layer: Any, load: Callable[..., None], loaded: _Loaded, rows: int
    ) -> Tensor:
        """Return the number of each of this rank's `rows` in the stacked shards (RacError)."""
        numbers = ModelWeightParameter(
            data=torch.full((rows, 1), -1), input_dim=1, output_dim=0, weight_loader=load
        )
        numbers.tp_rank = getattr(layer, "tp_rank", 0)
        numbers.tp_size = getattr(layer, "tp_size", 1)
        columns = getattr(layer, "input_size_per_partition", layer.input_size)
        first = 0
        for shard, weight in loaded.items():
            check_shape(self.name(shard), weight, _expected_rows(layer, shard), layer.input_size)
            n = weight.shape[0]
            shard_rows = torch.arange(first, first + n)[:, None]
            problem = f"{self.name(shard)}: {n} rows cannot be sharded as this model's"
            step = "serve it with another --tensor-parallel-size"
            with refusing(problem, step, RuntimeError, AssertionError):
                if columns < layer.input_size:  # row parallel: a rank has some columns of all rows
                    numbers.data.copy_(shard_rows)
                elif shard is None:  # loaders of layers that are not fused have no shard argument
                    load(numbers, shard_rows)
                else:
                    load(numbers, shard_rows, shard)
            first += n
        if bool((numbers.data < 0).any()):
            raise RacError(
                f"{self.prefix}: the checkpoint lacks {' or '.join(self.modules)}; copy it again"
            )
        return numbers.data.flatten()

    def name(self, shard: ShardId) -> str:
        """Return the shard's module on disk."""
        index = _position(shard) if isinstance(shard, (str, int)) else len(self.modules)
        return self.modules[index] if index < len(self.modules) else self.prefix

    def _collector(self, part: str) -> Callable[..., None]:
        def collect(param: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
            if self._finished:
                raise loaded_again(self.prefix)
            self._tensors.setdefault(loaded_shard_id, {})[part] = loaded_weight

        return collect


@register_weight_loader_v2_supported_method
class RacLinearMethod(LinearMethodBase):
    """The method of one layer; a kernel may round its inputs to `activation_bits`, 16 or 8."""

    def __init__(self, shards: Shards, add: AddDecision, activation_bits: int = 16) -> None:
        self.shards, self.add, self.activation_bits = shards, add, activation_bits
        self.dense = UnquantizedLinearMethod()
        self.packed: PackedWeight | None = None
        self.reordered = False

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
        self.dtype, self.rows = params_dtype, sum(output_partition_sizes)
        self.columns, self.all_columns = input_size_per_partition, input_size
        self.sizes = (self.columns, output_partition_sizes, input_size, output_size, params_dtype)
        self.attributes = extra_weight_attrs
        self.shards.register(layer, params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check what was collected (RacError), and keep the weight in one form, packed or dense."""
        loaded = self.shards.take(layer)
        rows = self.shards.row_numbers(layer, self.loader, loaded, self.rows)
        share = self._share(list(loaded.values()), rows, self._first_column(layer))
        if isinstance(share, str):
            decision, backend = stay_dense(share, self.dtype), None
        else:
            decision, backend = serve(share, Layer.of(share, self.dtype), self.device.type)
        if backend is None:
            dense = self._dense_weight(layer, loaded, rows)
            with self.device:
                self.dense.create_weights(layer, *self.sizes, **self.attributes)
            layer.get_parameter("weight").data.copy_(dense)
            self.dense.process_weights_after_loading(layer)
        else:
            assert isinstance(share, StoredWeight)
            self.packed = PackedWeight(layer, backend, share, self.dtype)
            if share.order is not None:
                order = Parameter(share.order, requires_grad=False)
                layer.register_parameter("column_order", order)
                self.reordered = True
        in_floats = all(isinstance(weight, Tensor) for weight in loaded.values())
        self.add(self.shards.prefix, None if in_floats else decision)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply x [..., K]: [..., N]."""
        if self.packed is None:
            return self.dense.apply(layer, x, bias)
        if self.reordered:
            x = x.index_select(-1, layer.get_parameter("column_order"))
        return self.packed.linear(layer, x, bias)

    def dequantize_weight(self, layer: torch.nn.Module) -> Tensor:
        """Return this rank's dense weight [N, K] of a loaded layer, which vLLM quantizes anew."""
        loaded = self.shards.take(layer)
        rows = self.shards.row_numbers(layer, self.loader, loaded, self.rows)
        return self._dense_weight(layer, loaded, rows).to(self.device)

    def _dense_weight(self, layer: Any, loaded: _Loaded, rows: Tensor) -> Tensor:
        dense = torch.cat([to_floats(weight, self.dtype) for weight in loaded.values()])
        first = self._first_column(layer)
        return dense[rows, first : first + self.columns]

    def _first_column(self, layer: Any) -> int:
        sharded = self.columns < self.all_columns
        return getattr(layer, "tp_rank", 0) * self.columns if sharded else 0

    def _share(self, loaded: list[Weight], rows: Tensor, first: int) -> StoredWeight | str:
        """Return this rank's share, from its `first` column on, or why it runs dense."""
        compressed = [weight for weight in loaded if isinstance(weight, StoredWeight)]
        if len(compressed) < len(loaded):
            return "a part of this fused layer is stored dense"
        try:
            share = stack(compressed, self.shards.prefix).select_rows(rows)
            share = share.select_columns(first, self.columns)
        except RacError as error:
            return str(error)
        return replace(share, activation_bits=self.activation_bits)


def to_floats(weight: Weight, dtype: torch.dtype) -> Tensor:
    """Return a loaded weight [N, K] in floats, its columns in the order of the inputs."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    dense = weight.dequantized(dtype)
    return dense if weight.order is None else dense[:, weight.order.argsort()]


def check_shape(module: str, weight: Weight, rows: int | None, columns: int) -> None:
    """Compare a weight of the checkpoint with the model's shape; `rows` None: any (RacError)."""
    if weight.shape[1] != columns or (rows is not None and weight.shape[0] != rows):
        raise RacError(
            f"{module}: the checkpoint has a weight {list(weight.shape)}, the model's "
            f"config.json has [{rows or '?'}, {columns}]; they do not match"
        )


def loaded_again(prefix: str) -> RacError:
    """Return the error for weights that arrive after packing (reload, or sleep level 2)."""
    return RacError(
        f"{prefix}: packed weights cannot be loaded into a running server again; start another "
        "one, and let it sleep at level 1, which keeps the weights"
    )


def _position(shard: ShardId) -> int:
    first = shard[0] if isinstance(shard, tuple) else shard
    if isinstance(first, str):
        return _QKV.get(first, len(_QKV))
    return int(first or 0)


def _expected_rows(layer: Any, shard: ShardId) -> int | None:
    """Return a shard's rows on disk by the model's config; None: the layer lacks them."""
    if isinstance(shard, str):
        head = getattr(layer, "v_head_size" if shard == "v" else "head_size", None)
        heads = getattr(layer, "total_num_heads" if shard == "q" else "total_num_kv_heads", None)
        return head * heads if head and heads and shard in _QKV else None
    if shard is not None:
        indices = shard if isinstance(shard, tuple) else (shard,)
        return sum(layer.output_sizes[index] for index in indices)
    # For QKV, output_size counts replicated heads several times.
    return None if hasattr(layer, "total_num_kv_heads") else layer.output_size
