"""The shards of one fused layer as they are loaded from the checkpoint, and which of their rows a rank needs.

vLLM's own loader cannot cut a packed weight, so it is given row numbers in place of the rows. Every layout that it can shard
(merged, QKV with replicated heads, fused on disk) is therefore sharded correctly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter

from rac_modifier.checkpoint import dense_codes
from rac_modifier.checkpoint.formats import FORMAT_BITMASK, PARTS
from rac_modifier.checkpoint.stored_weight import (
    FLOATS,
    SCALE,
    StoredWeight,
    check,
    check_scale,
    dequantize,
    from_dense,
)
from rac_modifier.errors import RacError

ShardId = Any  # None (the whole layer), an index, a tuple of indices, or "q", "k", "v"
_QKV = {"q": 0, "k": 1, "v": 2}
_DTYPES = {
    **{"bitmask": torch.uint8, "row_offsets": torch.int64, "shape": torch.int64},
    **{
        dense_codes.WORDS: torch.int32,
        dense_codes.WORDS_SHAPE: torch.int64,
        dense_codes.ZEROS: torch.int32,
    },
}
# Scales of activations are not used: the kernels round activations less than any scheme does.
_UNUSED = ("input_scale", "input_zero_point")
_ASYMMETRIC = (dense_codes.ZEROS, dense_codes.ORDER)


class Shards:
    """Collects what is loaded into a layer with the shards `modules` (names on disk), packed as `format`.

    `format` None: the weights are stored dense and are packed here. `scales`: who loads the scales of quantized weights:
    "ours", "vllm's", or "none" where nothing is quantized according to config.json.
    """

    def __init__(
        self, prefix: str, modules: list[str], format: str | None, scales: str = "none"
    ) -> None:
        self.prefix, self.modules, self.format, self.scales = prefix, modules, format, scales
        self._parts: dict[ShardId, dict[str, Tensor]] = {}
        self._taken = False
        # A dense weight is collected too: an ignored shard of a fused layer has one.
        self._names = parts_of(format, scales)

    def register(self, layer: Any, dtype: torch.dtype) -> None:
        """Add an empty parameter for each part. Its loader keeps the tensor itself, still mapped from the file."""
        for part in self._names:
            empty = torch.empty(0, dtype=_DTYPES.get(part, dtype))
            layer.register_parameter(
                part, BasevLLMParameter(data=empty, weight_loader=self._collector(part))
            )

    def take(self, layer: Any) -> dict[ShardId, StoredWeight | Tensor]:
        """Remove these parameters and return the checked weight of each shard, in the layer's order; a tensor if dense.

        Raises:
            RacError: naming the damaged tensor.
        """
        for part in self._names:
            delattr(layer, part)
        parts, self._parts, self._taken = self._parts, {}, True
        return {shard: self._checked(shard, parts[shard]) for shard in sorted(parts, key=_position)}

    def row_numbers(
        self,
        layer: Any,
        load: Callable[..., None],
        stored: dict[ShardId, StoredWeight | Tensor],
        rows: int,
    ) -> Tensor:
        """For each of this rank's `rows`, its row number in the stacked shards, int64 [rows]. `load`: the layer's loader.

        Raises:
            RacError: a shard is missing, or its shape is not that of the model.
        """
        numbers = ModelWeightParameter(
            data=torch.full((rows, 1), -1), input_dim=1, output_dim=0, weight_loader=load
        )
        numbers.tp_rank, numbers.tp_size = (
            getattr(layer, "tp_rank", 0),
            getattr(layer, "tp_size", 1),
        )
        row_parallel = (
            getattr(layer, "input_size_per_partition", layer.input_size) < layer.input_size
        )
        first = 0
        for shard, weight in stored.items():
            n, k = (
                (weight.rows, weight.columns)
                if isinstance(weight, StoredWeight)
                else tuple(weight.shape)
            )
            expected = _expected_rows(layer, shard)
            if k != layer.input_size or n != (expected or n):
                raise RacError(
                    f"{self.name(shard)}: the checkpoint has a weight [{n}, {k}], the model's config.json has "
                    f"[{expected or '?'}, {layer.input_size}]; they do not belong together"
                )
            these = torch.arange(first, first + n)[:, None]
            try:
                if row_parallel:  # each rank has some columns of all rows
                    numbers.data.copy_(these)
                else:
                    load_shard(load, numbers, these, shard)
            except (RuntimeError, AssertionError) as error:
                raise RacError(
                    f"{self.name(shard)}: {n} rows cannot be sharded as this model's ({error})"
                ) from error
            first += n
        if bool((numbers.data < 0).any()):
            raise RacError(
                f"{self.prefix}: the checkpoint lacks the weight of {' or '.join(self.modules)}; copy or save it again"
            )
        return numbers.data.flatten()

    def name(self, shard: ShardId) -> str:
        """The shard's module on disk."""
        index = _position(shard) if isinstance(shard, (str, int)) else len(self.modules)
        return self.modules[index] if index < len(self.modules) else self.prefix

    def _collector(self, part: str) -> Callable[..., None]:
        def collect(param: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
            if self._taken:
                raise loaded_again(self.prefix)
            self._parts.setdefault(loaded_shard_id, {})[part] = loaded_weight

        return collect

    def _checked(self, shard: ShardId, parts: dict[str, Tensor]) -> StoredWeight | Tensor:
        return checked(parts, self.format, self.scales, self.name(shard))


def parts_of(format: str | None, scales: str) -> tuple[str, ...]:
    """The names of the tensors that a module may have: those of a packed one, or a dense weight."""
    names = (*(PARTS[format] if format else ()), "weight")
    return (*names, SCALE, *_UNUSED, *_ASYMMETRIC) if scales == "ours" else names


def checked(
    parts: Mapping[str, Tensor], format: str | None, scales: str, name: str
) -> StoredWeight | Tensor:
    """The weight of module `name` from its tensors on disk; a tensor if it is stored dense beside packed ones.

    `format` and `scales` are those of `Shards`.

    Raises:
        RacError: naming the damaged tensor.
    """
    for part in _ASYMMETRIC:
        if part in parts:
            raise RacError(
                f"{name}.{part}: zeros of a weight that is not quantized symmetrically are not zero, so it cannot be "
                "sparse; quantize it symmetrically"
            )
    if "weight" not in parts:
        return check(parts, format or FORMAT_BITMASK, name, scaled=scales != "vllm's")
    weight = parts["weight"]
    if parts.keys() & {*PARTS[FORMAT_BITMASK]}:
        raise RacError(f"{name}.weight: stored both dense and packed; save the model again")
    if weight.dim() != 2 or not weight.numel():
        raise RacError(
            f"{name}.weight: shape {list(weight.shape)} is not that of a matrix; the checkpoint is damaged"
        )
    if format is None:
        return from_dense(weight, name)
    if scales != "ours" or (weight.dtype in FLOATS and SCALE not in parts):
        return weight
    rows, columns = weight.shape
    return dequantize(weight, check_scale(parts, weight.dtype, rows, columns, name), torch.float32)


class CodeShards(Shards):
    """Shards of dense weights of 2 to 4 `bits` (checkpoint/dense_codes.py), all of one kind.

    `group` columns share a scale, None for a row.
    """

    def __init__(
        self, prefix: str, modules: list[str], group: int | None, symmetric: bool, bits: int = 4
    ) -> None:
        super().__init__(prefix, modules, None)
        self.group, self.symmetric, self.bits = group, symmetric, bits
        self._names = (*dense_codes.PARTS, "weight")

    def _checked(self, shard: ShardId, parts: dict[str, Tensor]) -> StoredWeight:
        name = self.name(shard)
        if "weight" in parts:
            raise RacError(
                f"{name}.weight: not quantized, but config.json says that it is int{self.bits}; restore the config.json that "
                "was saved with these files"
            )
        return dense_codes.check_codes(parts, name, self.group, self.symmetric, self.bits)


def loaded_again(prefix: str) -> RacError:
    """The error for weights that come when a layer is packed already: vLLM's `reload_weights`, also after sleep at level 2."""
    return RacError(
        f"{prefix}: packed weights cannot be loaded into a running server again (reload_weights; sleep at level 2 drops them), "
        "so end this server and start another one. Sleep at level 1 keeps the weights"
    )


def load_shard(
    load: Callable[..., None], parameter: Tensor, tensor: Tensor, shard: ShardId
) -> None:
    """Call a layer's loader; loaders of layers that are not fused have no shard argument."""
    if shard is None:
        load(parameter, tensor)
    else:
        load(parameter, tensor, shard)


def _position(shard: ShardId) -> int:
    first = shard[0] if isinstance(shard, tuple) else shard
    return (
        0 if first is None else _QKV.get(first, len(_QKV)) if isinstance(first, str) else int(first)
    )


def _expected_rows(layer: Any, shard: ShardId) -> int | None:
    """Rows of a shard on disk according to the model's config; None where the layer lacks the numbers."""
    if isinstance(shard, str):
        head = getattr(layer, "v_head_size" if shard == "v" else "head_size", None)
        heads = getattr(layer, "total_num_heads" if shard == "q" else "total_num_kv_heads", None)
        return head * heads if head and heads and shard in _QKV else None
    if shard is not None:
        return sum(
            layer.output_sizes[index] for index in (shard if isinstance(shard, tuple) else (shard,))
        )
    # For QKV, output_size counts replicated heads several times.
    return None if hasattr(layer, "total_num_kv_heads") else layer.output_size
