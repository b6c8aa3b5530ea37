"""The shards of one fused layer as they are loaded from the checkpoint, and the rows that a rank needs.

vLLM's own loader cannot cut a packed weight, so it is given row numbers instead of the rows. Every
layout that it can shard (merged, QKV with replicated heads, fused on disk) is sharded correctly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter

from rac_modifier.errors import RacError
from rac_modifier.vllm_plugin.readers import LoadedWeight, WeightReader

ShardId = Any  # None (the whole layer), an index, a tuple of indices, or "q", "k", "v"
_QKV = {"q": 0, "k": 1, "v": 2}


class Shards:
    """Collect what is loaded into a layer with the shards `modules` (names on disk), for `reader`."""

    def __init__(self, prefix: str, modules: list[str], reader: WeightReader) -> None:
        self.prefix, self.modules, self.reader = prefix, modules, reader
        self._tensors: dict[ShardId, dict[str, Tensor]] = {}
        self._taken = False

    def register(self, layer: Any, dtype: torch.dtype) -> None:
        """Add an empty parameter for each tensor name.

        Its loader keeps the tensor itself, mapped from the file.
        """
        for part, stored in self.reader.parts.items():
            empty = torch.empty(0, dtype=stored or dtype)
            layer.register_parameter(
                part, BasevLLMParameter(data=empty, weight_loader=self._collector(part))
            )

    def take(self, layer: Any) -> dict[ShardId, LoadedWeight]:
        """Remove these parameters and return the checked weight of each shard, in the layer's order.

        Raises:
            RacError: naming the damaged tensor.
        """
        for part in self.reader.parts:
            delattr(layer, part)
        tensors, self._tensors, self._taken = self._tensors, {}, True
        return {
            shard: self.reader.read(tensors[shard], self.name(shard))
            for shard in sorted(tensors, key=_position)
        }

    def row_numbers(
        self,
        layer: Any,
        load: Callable[..., None],
        loaded: dict[ShardId, LoadedWeight],
        rows: int,
    ) -> Tensor:
        """Return the row number in the stacked shards of each of this rank's `rows`, int64 [rows].

        `load` is the layer's loader.

        Raises:
            RacError: a shard is missing, or its shape is not that of the model.
        """
        numbers = ModelWeightParameter(
            data=torch.full((rows, 1), -1), input_dim=1, output_dim=0, weight_loader=load
        )
        numbers.tp_rank = getattr(layer, "tp_rank", 0)
        numbers.tp_size = getattr(layer, "tp_size", 1)
        columns = getattr(layer, "input_size_per_partition", layer.input_size)
        first = 0
        for shard, weight in loaded.items():
            n, k = weight.shape
            expected = _expected_rows(layer, shard)
            if k != layer.input_size or n != (expected or n):
                raise RacError(
                    f"{self.name(shard)}: the checkpoint has a weight [{n}, {k}], the model's "
                    f"config.json has [{expected or '?'}, {layer.input_size}]; they do not belong "
                    "together"
                )
            shard_rows = torch.arange(first, first + n)[:, None]
            try:
                if columns < layer.input_size:  # row parallel: a rank has some columns of all rows
                    numbers.data.copy_(shard_rows)
                elif shard is None:  # loaders of layers that are not fused have no shard argument
                    load(numbers, shard_rows)
                else:
                    load(numbers, shard_rows, shard)
            except (RuntimeError, AssertionError) as error:
                raise RacError(
                    f"{self.name(shard)}: {n} rows cannot be sharded as this model's ({error})"
                ) from error
            first += n
        if bool((numbers.data < 0).any()):
            raise RacError(
                f"{self.prefix}: the checkpoint lacks the weight of {' or '.join(self.modules)}; "
                "copy or save it again"
            )
        return numbers.data.flatten()

    def order(self, loaded: dict[ShardId, LoadedWeight]) -> Tensor | None:
        """Return the column order that all shards share, int64 [K].

        None where it is that of the inputs.

        Raises:
            RacError: the shards have different orders.
        """
        (first, weight), *others = loaded.items()
        for shard, other in others:
            if not _equal(weight.order, other.order):
                raise RacError(
                    f"{self.name(shard)}.g_idx: its columns are in another order than those of "
                    f"{self.name(first)}, and one matmul reads both; quantize the model with "
                    "desc_act: false"
                )
        return weight.order

    def name(self, shard: ShardId) -> str:
        """Return the shard's module on disk."""
        index = _position(shard) if isinstance(shard, (str, int)) else len(self.modules)
        return self.modules[index] if index < len(self.modules) else self.prefix

    def _collector(self, part: str) -> Callable[..., None]:
        def collect(param: Tensor, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
            if self._taken:
                raise loaded_again(self.prefix)
            self._tensors.setdefault(loaded_shard_id, {})[part] = loaded_weight

        return collect


def loaded_again(prefix: str) -> RacError:
    """Return the error for weights that come after a layer is packed.

    `reload_weights`, or sleep at level 2.
    """
    return RacError(
        f"{prefix}: packed weights cannot be loaded into a running server again (reload_weights; "
        "sleep at level 2 drops them), so end this server and start another one. Sleep at level 1 "
        "keeps the weights"
    )


def _position(shard: ShardId) -> int:
    first = shard[0] if isinstance(shard, tuple) else shard
    if isinstance(first, str):
        return _QKV.get(first, len(_QKV))
    return int(first or 0)


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right if left is None or right is None else torch.equal(left, right)


def _expected_rows(layer: Any, shard: ShardId) -> int | None:
    """Return the rows of a shard on disk by the model's config.

    None where the layer lacks the numbers.
    """
    if isinstance(shard, str):
        head = getattr(layer, "v_head_size" if shard == "v" else "head_size", None)
        heads = getattr(layer, "total_num_heads" if shard == "q" else "total_num_kv_heads", None)
        return head * heads if head and heads and shard in _QKV else None
    if shard is not None:
        indices = shard if isinstance(shard, tuple) else (shard,)
        return sum(layer.output_sizes[index] for index in indices)
    # For QKV, output_size counts replicated heads several times.
    return None if hasattr(layer, "total_num_kv_heads") else layer.output_size
