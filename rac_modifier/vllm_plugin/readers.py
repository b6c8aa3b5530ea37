"""What reads the tensors of a module, which are untrusted input, by how they are stored."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from rac_modifier.checkpoint import gptq_awq
from rac_modifier.checkpoint.formats import FORMAT_BITMASK, FORMATS, SparseBitmask
from rac_modifier.errors import RacError
from rac_modifier.formats.bitmask import damaged, part_of
from rac_modifier.formats.quantization_config import WeightScheme, has_block_scales
from rac_modifier.formats.stored_weight import (
    FLOATS,
    PER_BLOCK,
    SCALE,
    StoredWeight,
    check_scale,
    dequantize,
)
from rac_modifier.formats.words import ORDER, WORDS, ZEROS, PackQuantized

_RESTORE = "restore the config.json that was saved with the checkpoint"
# Scales of activations are not used: the kernels round activations less than any scheme does.
_UNUSED = ("input_scale", "input_zero_point")

Weight = StoredWeight | Tensor  # compressed, or in floats [N, K]


class WeightReader(Protocol):
    """Reads one module; `dtypes`: its tensors' names and dtypes on disk (None: the model's)."""

    dtypes: Mapping[str, torch.dtype | None]

    def read(self, tensors: Mapping[str, Tensor], module: str) -> Weight:
        """Check the tensors of `module`; return its weight (RacError names a damaged one)."""
        ...


class CodesReader:
    """Dense weights of compressed-tensors; `schemes` by module, None for a module in floats."""

    dtypes = PackQuantized.dtypes

    def __init__(self, schemes: Mapping[str, WeightScheme | None]) -> None:
        self.schemes = schemes
        known = (scheme for scheme in schemes.values() if scheme is not None)
        self.symmetric = all(scheme.encoding.symmetric for scheme in known)

    def read(self, tensors: Mapping[str, Tensor], module: str) -> Weight:
        """Return the weight with every value stored; a tensor where nothing is quantized."""
        # A layer that is fused on disk, too, has its own name, and the scheme of its shards.
        scheme = self.schemes.get(module, next(iter(self.schemes.values())))
        if scheme is None:
            return _floats_of(tensors, module)
        bits = scheme.encoding.bits
        if bits != 8 and "weight" in tensors:
            raise RacError(
                f"{module}.weight: not quantized, but config.json says int{bits}; {_RESTORE}"
            )
        return PackQuantized.check(tensors, module, scheme)


class PackedReader:
    """Packed sparse weights of a `format`; next to them, dense codes and floats."""

    def __init__(
        self,
        format: SparseBitmask,
        quantized: bool,
        schemes: Iterable[WeightScheme],
        scheme_of: Callable[[Any, str], WeightScheme | None],
    ) -> None:
        self.format, self.quantized, self.scheme_of = format, quantized, scheme_of
        self.block_scales = has_block_scales(schemes)
        stored: dict[str, torch.dtype | None] = {
            "bitmask": torch.uint8,
            "row_offsets": torch.int64,
            "shape": torch.int64,
        }
        names = [*format.parts, "weight"]  # an ignored shard of a fused layer has a weight
        if quantized:
            stored.update(PackQuantized.dtypes)
            names += [*PackQuantized.dtypes, *_UNUSED]
        self.dtypes: Mapping[str, torch.dtype | None] = {name: stored.get(name) for name in names}

    def read(self, tensors: Mapping[str, Tensor], module: str) -> Weight:
        """Return the weight, sparse or of dense codes; a tensor where it is stored in floats."""
        if WORDS in tensors:  # packing this part of a fused layer would have gained nothing
            scheme = self.scheme_of(torch.nn.Linear(1, 1, device="meta"), module)
            if scheme is None:
                raise RacError(
                    f"{module}.{WORDS}: config.json does not quantize this module; {_RESTORE}"
                )
            return PackQuantized.check(tensors, module, scheme)
        for part in (ZEROS, ORDER):
            if part in tensors:
                raise RacError(
                    f"{module}.{part}: zeros of a weight that is not quantized symmetrically are "
                    "not zero, so it cannot be sparse; quantize it symmetrically"
                )
        if "weight" not in tensors:
            sparse = self.format.check(tensors, module, self.block_scales)
            if sparse.per_block:
                raise RacError(f"{module}.{SCALE}: {PER_BLOCK}; rac unpack writes the model dense")
            return sparse
        weight = _matrix_of(tensors, module)
        if tensors.keys() & {*FORMATS[FORMAT_BITMASK].parts}:
            raise RacError(f"{module}.weight: stored both dense and packed; save the model again")
        if not self.quantized or (weight.dtype in FLOATS and SCALE not in tensors):
            return weight
        rows, columns = weight.shape
        scale = check_scale(tensors, weight.dtype, rows, columns, module)
        return dequantize(weight, scale, torch.float32)


class GptqAwqReader:
    """Words of GPTQ or AWQ by the `entries` of config.json, or a weight in floats."""

    dtypes: Mapping[str, torch.dtype | None] = {
        **dict.fromkeys(gptq_awq.PARTS, torch.int32),
        **dict.fromkeys((gptq_awq.SCALES, "weight")),
    }

    def __init__(self, entries: gptq_awq.Gptq | gptq_awq.Awq) -> None:
        self.entries = entries

    def read(self, tensors: Mapping[str, Tensor], module: str) -> Weight:
        """Return the weight with every value stored; a tensor where it is in floats."""
        if "weight" in tensors:
            return _floats_of(tensors, module)
        return self.entries.check(tensors, module)


def _floats_of(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """Return a module's only tensor, `weight` [N, K] in floats."""
    weight = _matrix_of(tensors, module)
    if weight.dtype not in FLOATS or len(tensors) > 1:
        raise RacError(
            f"{module}.weight: {weight.dtype} next to {sorted(tensors)}, but config.json does not "
            f"quantize it so; {_RESTORE}"
        )
    return weight


def _matrix_of(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """Return the tensor `weight` [N, K] of a module."""
    weight = part_of(tensors, module, "weight")
    if weight.dim() != 2 or not weight.numel():
        raise damaged(f"{module}.weight", f"shape {list(weight.shape)} is not that of a matrix")
    return weight
