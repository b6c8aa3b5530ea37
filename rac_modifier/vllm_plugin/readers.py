"""Read a module's tensors as the checkpoint stores them, checked as untrusted input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rac_modifier.checkpoint import dense_codes
from rac_modifier.checkpoint.quantization_config import PACK_QUANTIZED
from rac_modifier.checkpoint.stored_weight import FLOATS, SCALE, StoredWeight
from rac_modifier.errors import RacError

RESTORE = "restore the config.json that was saved with the checkpoint"
_INT8_FORMATS = (PACK_QUANTIZED, "int-quantized", "naive-quantized")


class LoadedWeight(NamedTuple):
    """A module's weight: a tensor in floats, or compressed.

    order int64 [K]: column i of the weight multiplies x[..., order[i]]; None: in the inputs' order.
    """

    weight: StoredWeight | Tensor
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Return rows and columns."""
        if isinstance(self.weight, StoredWeight):
            return self.weight.rows, self.weight.columns
        rows, columns = self.weight.shape
        return rows, columns

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [N, K] in floats, its columns in the order of the inputs."""
        stored = self.weight
        dense = stored.dequantized(dtype) if isinstance(stored, StoredWeight) else stored.to(dtype)
        return dense if self.order is None else dense[:, self.order.argsort()]


class WeightReader(Protocol):
    """Reads one module; `dtypes`: its tensors' names and dtypes on disk (None: the model's)."""

    dtypes: Mapping[str, torch.dtype | None]

    def read(self, tensors: Mapping[str, Tensor], module: str) -> LoadedWeight:
        """Check the tensors of `module`; return its weight (RacError names a damaged one)."""
        ...


class CodesReader:
    """Dense weights of compressed-tensors: 2 to 4 bits in words, 8 bits in words or bytes.

    `weights`: the arguments in config.json of each module's weight; None for a module in floats.
    """

    dtypes: Mapping[str, torch.dtype | None] = {
        dense_codes.WORDS: torch.int32,
        SCALE: None,
        dense_codes.WORDS_SHAPE: torch.int64,
        dense_codes.ZEROS: torch.int32,
        dense_codes.ORDER: torch.int32,
        "weight": None,
    }

    def __init__(self, weights: Mapping[str, Any]) -> None:
        self.weights = weights

    def read(self, tensors: Mapping[str, Tensor], module: str) -> LoadedWeight:
        """Return the weight with every value stored; a tensor where nothing is quantized."""
        # A layer that is fused on disk, too, has its own name, and the arguments of its shards.
        arguments = self.weights.get(module, next(iter(self.weights.values())))
        if arguments is None:
            return LoadedWeight(floats_of(tensors, module))
        bits = arguments.num_bits
        group = arguments.group_size if arguments.strategy == "group" else None
        if bits != 8 and "weight" in tensors:
            raise RacError(
                f"{module}.weight: not quantized, but config.json says that it is "
                f"int{bits}; {RESTORE}"
            )
        return LoadedWeight(
            dense_codes.check_codes(tensors, module, group, bool(arguments.symmetric), bits)
        )


def why_not_codes(
    scheme: Mapping[str, Any], format: str | None, vocabulary: bool = False
) -> str | None:
    """Return why no kernel runs a weight of a `scheme` of vLLM's target_scheme_map, else None.

    `format`: of the checkpoint, for a scheme without one. `vocabulary`: of a head or embedding,
    which may have 8 or 4 bits; linear layers have 4, 3 or 2.
    """
    weights = scheme["weights"].model_dump(mode="json")  # names instead of enums
    kind, bits, strategy = weights["type"], weights["num_bits"], weights["strategy"]
    format = scheme.get("format") or format
    if vocabulary and (kind, bits) == ("int", 8):
        if not weights["symmetric"]:
            return "its weights are asymmetric int8"
        if format not in _INT8_FORMATS:
            return f"its format is {format}"
        return None if strategy in ("group", "channel", "tensor") else f"its scales are {strategy}"
    if vocabulary and bits != 4:
        return f"its weights are {kind}{bits}"
    rounded = (scheme.get("input_activations") or scheme.get("output_activations")) is not None
    return dense_codes.why_not_codes(kind, bits, strategy, format, activations=rounded)


def floats_of(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """Return a module's only tensor, `weight` [N, K] in floats."""
    weight = matrix_of(tensors, module)
    if weight.dtype not in FLOATS or len(tensors) > 1:
        raise RacError(
            f"{module}.weight: {weight.dtype} next to {sorted(tensors)}, but config.json does not "
            f"quantize it so; {RESTORE}"
        )
    return weight


def matrix_of(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """Return the tensor `weight` [N, K] of a module."""
    weight = tensors.get("weight")
    if weight is None:
        raise RacError(f"{module}.weight: missing from the checkpoint; copy or save it again")
    if weight.dim() != 2 or not weight.numel():
        raise RacError(
            f"{module}.weight: shape {list(weight.shape)} is not that of a matrix; the checkpoint "
            "is damaged"
        )
    return weight
