"""The three functions of the CPU backend: whether a layer runs on its kernels, packing, and the product."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from rac_modifier.checkpoint.stored_weight import StoredWeight
from rac_modifier.kernels.cpu import operator
from rac_modifier.kernels.cpu.encoding import UNIT, ValueEncoding, encoding_of
from rac_modifier.kernels.cpu.library import BYTE_ISAS, PLANES4
from rac_modifier.kernels.cpu.packed import (
    pack_dense,
    pack_scale,
    pack_values,
    set_activation_bits,
    sparse_int4_type,
    split_groups,
)
from rac_modifier.kernels.cpu.support import support
from rac_modifier.kernels.interface import Decision, Layer

DATA, SCALE = "weight_packed", "weight_packed_scale"  # vLLM's LoRA looks for the first name
_WORD_BYTES = 4  # a mask of 16 rows x 2 columns
_LEAST_CEILING = 1.1  # below this, a kernel would have to be perfect to gain anything


def can_run(layer: Layer) -> Decision:
    """Sparse where this machine has a kernel for the values and the packed weight is at least 1.1 times smaller."""
    encoding = encoding_of(layer.stored, layer.group, layer.columns, layer.served, layer.word_bits)
    dtype, dense_bytes = encoding.dtype, layer.served.itemsize
    masked = not _without_masks(dtype, layer.density)
    available = support()
    bytes_per_weight = _bytes_per_weight(layer, encoding, masked, available.isa is not None)

    def decision(kernel: str | None, reason: str) -> Decision:
        return Decision(
            kernel is not None, kernel or "dense", reason, bytes_per_weight, dense_bytes
        )

    if available.isa is None:
        return decision(None, f"dense because {available.reason}")
    if dtype not in (torch.bfloat16, torch.float32, torch.float16, torch.int8):
        return decision(None, f"dense because no sparse kernel reads {dtype}")
    baseline = f"{dense_bytes} of dense {str(layer.served).removeprefix('torch.')}"
    ceiling = dense_bytes / bytes_per_weight
    if ceiling < _LEAST_CEILING:
        return decision(
            None,
            f"dense because packed it takes {bytes_per_weight:.2f} bytes per weight instead of the {baseline}: "
            f"at most {ceiling:.2f}x faster",
        )
    if available.isa == "portable" and os.environ.get("RAC_KERNEL") != "portable":
        return decision(
            None,
            "dense because this processor has none of AVX2, AVX512 and NEON, and the portable kernel is slower than a dense "
            "product; set RAC_KERNEL=portable to use it anyway",
        )
    integers = f"int{encoding.bits} " if dtype == torch.int8 else ""
    kernel = f"{'sparse ' if masked else ''}{integers}kernel {available.isa}"
    notes = [encoding.note] if encoding.note else []
    if dtype == torch.int8 and layer.activation_bits == 8:
        notes.append(
            "activations in 8 bits"
            if available.isa in BYTE_ISAS
            else "activations in 16 bits, since it multiplies no bytes"
        )
    kernel += f" ({'; '.join(notes)})" if notes else ""
    return decision(
        kernel,
        f"{kernel}: {bytes_per_weight:.2f} bytes per weight instead of the {baseline}, at most {ceiling:.2f}x faster",
    )


def pack(weight: StoredWeight, served: torch.dtype) -> dict[str, Tensor]:
    """`weight_packed` in the kernels' layout (csrc/layout.h), and for scaled values `weight_packed_scale`.

    Raises:
        RacError: a dtype that no kernel reads, or no compiled library.
    """
    layer = Layer.of(weight, served)
    encoding = encoding_of(layer.stored, weight.group, weight.columns, served, layer.word_bits)
    if weight.scale is not None and not encoding.scaled:
        weight = weight.floats(encoding.dtype)
    values = weight.values.to(encoding.dtype)
    codes, unit = encoding.bits < 8, UNIT[encoding.bits]
    zeros = (
        None
        if weight.zeros is None or not codes
        else split_groups(weight.zeros, weight.group, unit)
    )
    if _without_masks(encoding.dtype, weight.density):
        packed = {
            DATA: pack_dense(values.reshape(weight.rows, weight.columns), encoding.bits, zeros)
        }
    else:
        packed = {
            DATA: pack_values(
                values, weight.bitmask, weight.columns, encoding.bits, zeros, weight.group
            )
        }
    if encoding.dtype == torch.int8 and weight.activation_bits == 8:
        set_activation_bits(packed[DATA], 8)
    if weight.scale is not None:
        packed[SCALE] = pack_scale(weight.scale, weight.group, narrow=codes, unit=unit)
    return packed


def linear(
    x: Tensor, packed: Mapping[str, Tensor], rows: int, columns: int, bias: Tensor | None = None
) -> Tensor:
    """X [..., columns] times the transposed weight, plus bias [rows]: [..., rows] in x's dtype, summed in fp32.

    x is bfloat16, float32 or float16, in any combination with the weight; float16 is multiplied as float32. Works under
    torch.compile and without gradients.

    Raises:
        RacError: other dtypes, or shapes that do not fit the packed weight.
    """
    if x.dtype == torch.float16:
        return linear(
            x.float(), packed, rows, columns, None if bias is None else bias.float()
        ).half()
    return operator.sparse_linear(x, packed[DATA], rows, columns, bias, packed.get(SCALE))


def _without_masks(dtype: torch.dtype, density: float) -> bool:
    """Whether a weight is packed without masks: integers of which all are stored."""
    return dtype == torch.int8 and density == 1.0


def _bytes_per_weight(layer: Layer, encoding: ValueEncoding, masked: bool, packs: bool) -> float:
    panels, weights = -(-layer.rows // 16), layer.rows * layer.columns
    # float16 is packed as float32, exactly
    value_bytes = 4 if encoding.dtype == torch.float16 else encoding.dtype.itemsize
    groups = layer.columns // layer.group
    total = layer.group_bytes * panels * 16 * groups if encoding.scaled and groups > 1 else 0
    if not masked:
        return (total + panels * 16 * -(-layer.columns // 64) * 64 * encoding.bits // 8) / weights
    total += panels * -(-layer.columns // 32) * 16 * _WORD_BYTES
    values = value_bytes * layer.density
    if encoding.bits == 4:
        # Where values are pruned at random. INT4: half a byte in every second quad. PLANES4: 3.5 bits in each plane, on average.
        padding = 0.25 * panels * -(-layer.columns // 4)
        if packs and sparse_int4_type(layer.columns, layer.group) == PLANES4:
            padding = 1.75 * panels * 8 * -(-layer.columns // 32)
        values = layer.density / 2 + (padding / weights if 0 < layer.density < 1 else 0.0)
    return values + total / weights
