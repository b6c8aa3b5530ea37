"""An output head or an embedding that a checkpoint of compressed-tensors has in int8 or int4, on the CPU kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from rac_modifier.checkpoint.dense_codes import PARTS, check_codes, check_int8
from rac_modifier.checkpoint.quantization_config import PACK_QUANTIZED
from rac_modifier.checkpoint.stored_weight import StoredWeight, all_stored, stack
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import choose
from rac_modifier.kernels.interface import Layer
from rac_modifier.vllm_plugin.head import (
    EMBEDDING,
    VARIABLE,
    RoundedMethod,
    UntiedHeadMethod,
    wanted_bits,
)
from rac_modifier.vllm_plugin.shards import ShardId, Shards
from rac_modifier.vllm_plugin.vocabulary import VocabularyMethod, logger

_DEVICE = "cpu"  # the one whose backend multiplies dense integers
_INT8_FORMATS = (PACK_QUANTIZED, "int-quantized", "naive-quantized")


class VocabularyMethods:
    """Chooses the method of a model's head and embeddings."""

    def __init__(self) -> None:
        self._stored_embedding = False

    def choose(
        self,
        layer: VocabParallelEmbedding,
        prefix: str,
        quantized: CompressedTensorsConfig | None,
        vllms: Callable[[], QuantizeMethodBase | None],
    ) -> QuantizeMethodBase | None:
        """The checkpoint's, one that the environment requests, or vLLM's. `quantized`: what config.json says, if it says so.

        Raises:
            RacError: the environment requests to round what is quantized already.
        """
        is_head = isinstance(layer, ParallelLMHead)
        what, variable = ("head", VARIABLE) if is_head else ("embedding", EMBEDDING)
        bits = wanted_bits(variable)
        scheme = None if quantized is None else quantized.get_scheme_dict(layer, prefix)
        kernel_reads = (
            scheme is not None
            and quantized is not None
            and why_not(scheme, quantized.quant_format) is None
        )
        method = (
            StoredMethod(prefix, scheme["weights"])
            if kernel_reads and scheme is not None
            else vllms()
        )
        if method is not None:
            if bits is not None:
                raise RacError(
                    f"{variable}=int{bits}: the checkpoint has a quantized {what} already; unset {variable}"
                )
            self._stored_embedding |= kernel_reads and not is_head
            return method
        if bits is not None:
            return RoundedMethod(variable, bits)
        if is_head and self._stored_embedding:
            return VocabularyMethod()  # which may be tied to it
        return UntiedHeadMethod() if is_head and wanted_bits(EMBEDDING) is not None else None


def why_not(scheme: Mapping[str, Any], format: str | None) -> str | None:
    """Why vLLM's own method runs a head or embedding of a `scheme` of vLLM's target_scheme_map; None where the kernels do.

    `format`: that of the checkpoint, for a scheme without one of its own.
    """
    if torch.empty(0).device.type != _DEVICE:  # vLLM sets the default device
        return f"there is no dense integer kernel for {torch.empty(0).device.type}"
    weights = scheme["weights"].model_dump(mode="json")  # names in place of enums
    kind = f"{weights['type']}{weights['num_bits']}"
    if kind not in ("int4", "int8"):
        return f"its weights are {kind}"
    if kind == "int8" and not weights["symmetric"]:
        return "its weights are asymmetric int8"
    if scheme.get("output_activations") is not None or (
        kind == "int4" and scheme.get("input_activations") is not None
    ):
        return "its activations are quantized too"
    own = scheme.get("format") or format
    if own not in ((PACK_QUANTIZED,) if kind == "int4" else _INT8_FORMATS):
        return f"its format is {own}"
    if weights["strategy"] not in (
        ("group", "channel") if kind == "int4" else ("group", "channel", "tensor")
    ):
        return f"its scales are per {weights['strategy']}"
    return None


class StoredMethod(VocabularyMethod):
    """Collects the tensors on disk of one head or embedding, and packs this rank's rows, or expands them to floats.

    `weights` are the arguments of config.json: bits, group, symmetry. Activations are not quantized as a scheme says.
    """

    def __init__(self, prefix: str, weights: Any) -> None:
        super().__init__()
        self.shards = _VocabularyShards(prefix, weights)

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
        """Register the parameters that collect the parts."""
        self.rows, self.columns, self.dtype = sum(output_partition_sizes), input_size, params_dtype
        self.shards.register(layer, params_dtype)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was collected, then keep it packed; without a kernel, in floats.

        Raises:
            RacError: a damaged or missing tensor, or a shape that is not the model's.
        """
        name = self.shards.prefix
        taken = self.shards.take(layer)
        if not taken and self.tied is not None:  # only the embedding is on disk
            if not self.shares(layer):
                self.keep_plain(layer)
            return
        if not taken:
            raise RacError(f"{name}: the checkpoint lacks its weight; copy or save it again")
        (stored,) = taken.values()
        assert isinstance(stored, StoredWeight)
        if (stored.rows, stored.columns) != (layer.org_vocab_size, self.columns):
            raise RacError(
                f"{name}: the checkpoint has a weight [{stored.rows}, {stored.columns}], the model's config.json has "
                f"[{layer.org_vocab_size}, {self.columns}]; they do not belong together"
            )
        own = layer.shard_indices
        share = stored.select_rows(torch.arange(own.org_vocab_start_index, own.org_vocab_end_index))
        share = _padded(share, self.rows)
        decision, backend = choose(Layer.of(share, self.dtype), _DEVICE)
        if backend is None:
            self.keep_plain(layer, share.dequantized(self.dtype))
        else:
            self.keep_packed(layer, backend, share, self.dtype)
        shape = [stored.rows, stored.columns]
        logger.info(
            "%s: int%d %s from the checkpoint: %s", name, stored.bits, shape, decision.reason
        )


class _VocabularyShards(Shards):
    """The parts of one head or embedding."""

    def __init__(self, prefix: str, weights: Any) -> None:
        super().__init__(prefix, [prefix], None)
        self.weights = weights
        self._names = (*PARTS, "weight")

    def _checked(self, shard: ShardId, parts: dict[str, Tensor]) -> StoredWeight:
        group = self.weights.group_size if self.weights.strategy == "group" else None
        if self.weights.num_bits == 4:
            return check_codes(parts, self.prefix, group, bool(self.weights.symmetric))
        return check_int8(parts, self.prefix, group)


def _padded(weight: StoredWeight, rows: int) -> StoredWeight:
    """With rows of zeros behind it, as vLLM pads a vocabulary."""
    missing = rows - weight.rows
    if missing < 1:
        return weight
    assert weight.scale is not None
    zeros = torch.zeros(missing, weight.columns, dtype=weight.values.dtype)
    padding = replace(
        all_stored(zeros, weight.name),
        scale=torch.ones(missing, weight.scale.shape[1]),
        bits=weight.bits,
        zeros=None
        if weight.zeros is None
        else torch.full((missing, weight.zeros.shape[1]), 8, dtype=torch.uint8),
    )
    return stack([weight, padding], weight.name)
