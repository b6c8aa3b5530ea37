"""The CPU backend: whether its C++ kernels (csrc/) run a layer, packing, and the matmul."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import FLOATS, StoredWeight
from rac_modifier.kernels.cpu import operator
from rac_modifier.kernels.cpu.library import DENSE_TYPES, INT4, MOST_GROUP, PANEL, VALUE_TYPES
from rac_modifier.kernels.cpu.support import library_and_isa
from rac_modifier.kernels.cpu.support import support as machine_support
from rac_modifier.kernels.interface import Decision, Layer, stay_dense

# By bits of values: groups have a multiple of this number of columns (csrc/format/layout.h).
UNIT = {8: 4, 4: 8, 3: 32, 2: 32}
DATA, SCALE = "weight_packed", "weight_packed_scale"  # vLLM's LoRA looks for the first name
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.int8)
_WORD_BYTES = 4  # a mask of 16 rows x 2 columns
_LEAST_CEILING = 1.1  # below this, a kernel would have to be perfect to gain anything


@dataclass(frozen=True)
class ValueEncoding:
    """How values are packed: as `dtype`; integers and fp8 with their scales.

    `bits` 4, 3 or 2: int8 values are packed as codes. `note` describes another form than on disk.
    """

    dtype: torch.dtype
    note: str = ""
    bits: int = 8


def encoding_of(
    stored: torch.dtype, group: int, columns: int, served: torch.dtype, word_bits: int = 4
) -> ValueEncoding | str:
    """Return the encoding of `stored` values (int32: words), or why no kernel reads them."""
    if stored in FLOATS:  # float32 activations need no float32 weights: the same numbers
        narrow = (stored, served) == (torch.bfloat16, torch.float32)
        return ValueEncoding(stored if narrow else served)
    in_groups = f"in groups of {group}"
    if stored in _FP8:
        exact = ValueEncoding(torch.bfloat16, "fp8 values as bfloat16, exactly")
        return exact if group == columns else f"no kernel reads fp8 values {in_groups}"
    if group < columns and (group % 4 or group > MOST_GROUP):
        return f"no kernel reads values {in_groups} columns, only of a multiple of 4 up to 512"
    if stored == torch.int8:
        return ValueEncoding(torch.int8)
    if group == columns or group % UNIT[word_bits] == 0:
        return ValueEncoding(torch.int8, bits=word_bits)
    values = f"int{word_bits} values {in_groups}"
    if group % UNIT[4] == 0:
        return ValueEncoding(torch.int8, f"{values}, four bits each", bits=4)
    return ValueEncoding(torch.int8, f"{values}, one byte each")


def can_run(layer: Layer) -> Decision:
    """Decide for a kernel if it reads the values and the packed weight is 1.1 times smaller."""
    encoding = encoding_of(layer.stored, layer.group, layer.columns, layer.served, layer.word_bits)
    if isinstance(encoding, str):
        return stay_dense(encoding, layer.served)
    dense_bytes, bytes_per_weight = layer.served.itemsize, _bytes_per_weight(layer, encoding)
    ceiling = dense_bytes / bytes_per_weight
    of_dense = f"instead of the {dense_bytes} of dense {str(layer.served).removeprefix('torch.')}"
    available = machine_support()
    reason = ""
    if available.isa is None:
        reason = available.reason
    elif encoding.dtype not in _DTYPES:
        reason = f"no sparse kernel reads {encoding.dtype}"
    elif ceiling < _LEAST_CEILING:
        reason = (
            f"packed it takes {bytes_per_weight:.2f} bytes per weight {of_dense}: "
            f"at most {ceiling:.2f}x faster"
        )
    elif available.isa == "portable" and os.environ.get("RAC_KERNEL") != "portable":
        reason = (
            "this processor has none of AVX2, AVX512 and NEON, and the portable kernel is slower "
            "than a dense matmul; set RAC_KERNEL=portable to use it anyway"
        )
    if reason:
        return Decision(False, "dense", f"dense because {reason}", bytes_per_weight, dense_bytes)
    kernel = _name(layer, encoding, available.isa or "", available.multiplies_bytes)
    size = f"{bytes_per_weight:.2f} bytes per weight {of_dense}, at most {ceiling:.2f}x faster"
    return Decision(True, kernel, f"{kernel}: {size}", bytes_per_weight, dense_bytes)


def pack(weight: StoredWeight, served: torch.dtype) -> dict[str, Tensor]:
    """Return `weight_packed`, and `weight_packed_scale` of scaled values (RacError: no kernel)."""
    layer = Layer.of(weight, served)
    encoding = encoding_of(layer.stored, weight.group, weight.columns, served, layer.word_bits)
    if isinstance(encoding, str):
        raise RacError(f"{weight.name}: {encoding}; keep it dense")
    codes = encoding.bits < 8
    data = pack_values(
        weight.values.to(encoding.dtype),
        None if _without_masks(encoding.dtype, weight.density) else weight.bitmask,
        (weight.rows, weight.columns),
        encoding.bits,
        weight.zeros if codes else None,
    )
    if encoding.dtype == torch.int8 and weight.activation_bits == 8:
        library_and_isa()[0].set_activation_bits(data, 8)
    if weight.scale is None:
        return {DATA: data}
    return {DATA: data, SCALE: pack_scale(weight.scale, narrow=codes)}


def linear(
    x: Tensor, packed: Mapping[str, Tensor], rows: int, columns: int, bias: Tensor | None = None
) -> Tensor:
    """Multiply by `operator.sparse_linear`; float16 is multiplied as float32."""
    if x.dtype == torch.float16:
        bias = None if bias is None else bias.float()
        return linear(x.float(), packed, rows, columns, bias).half()
    return operator.sparse_linear(x, packed[DATA], rows, columns, bias, packed.get(SCALE))


def lookup(
    ids: Tensor, packed: Mapping[str, Tensor], rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Return rows `ids` of a packed weight, scaled: [*ids.shape, columns] (RacError: no row)."""
    scale = packed.get(SCALE)
    return torch.ops.rac_modifier.packed_rows(ids, packed[DATA], rows, columns, scale, dtype)


def _name(layer: Layer, encoding: ValueEncoding, isa: str, multiplies_bytes: bool) -> str:
    """Return a name such as "sparse int8 kernel avx2", with what is unusual in brackets."""
    integers = encoding.dtype == torch.int8
    notes = [encoding.note] if encoding.note else []
    if integers and layer.activation_bits == 8:
        refused = "activations in 16 bits, since it multiplies no bytes"
        notes.append("activations in 8 bits" if multiplies_bytes else refused)
    kernel = f"int{encoding.bits} kernel {isa}" if integers else f"kernel {isa}"
    if not _without_masks(encoding.dtype, layer.density):
        kernel = f"sparse {kernel}"
    return f"{kernel} ({'; '.join(notes)})" if notes else kernel


def _without_masks(dtype: torch.dtype, density: float) -> bool:
    """Return whether a weight is packed without masks: integers that are all stored."""
    return dtype == torch.int8 and density == 1.0


def _bytes_per_weight(layer: Layer, encoding: ValueEncoding) -> float:
    panels, weights = -(-layer.rows // 16), layer.rows * layer.columns
    groups = layer.columns // layer.group
    scales = layer.group_bytes * panels * 16 * groups if groups > 1 else 0
    if _without_masks(encoding.dtype, layer.density):
        values = panels * 16 * -(-layer.columns // 64) * 64 * encoding.bits // 8
        return (scales + values) / weights
    masks = panels * -(-layer.columns // 32) * 16 * _WORD_BYTES
    # float16 is packed as float32, exactly
    value_bytes = 4.0 if encoding.dtype == torch.float16 else encoding.dtype.itemsize
    padding = 0.0
    if encoding.bits == 4:  # half a byte in every second quad, where values are pruned at random
        value_bytes = 0.5
        padding = 0.25 * panels * -(-layer.columns // 4) if 0 < layer.density < 1 else 0.0
    return value_bytes * layer.density + (scales + masks + padding) / weights


def pack_values(
    values: Tensor,
    bitmask: Tensor | None,
    shape: tuple[int, int],
    bits: int = 8,
    zeros: Tensor | None = None,
) -> Tensor:
    """Pack a weight of `shape` [N, K]: uint8 [bytes] (RacError: these do not fit together).

    values: the stored values, row-major; bfloat16, float32, int8, or float16 (as float32).
    bitmask: uint8 [N, ceil(K / 8)]; bit i of byte j is column 8j + i. None: all are stored (int8).
    bits: 4 packs int8 values as codes of four bits; 3 and 2 only without a bitmask.
    zeros: codes of zero, uint8 [N, groups], 0 to 15; a value is a code minus its code of zero.
    """
    if values.dtype == torch.float16:
        values = values.float()
    if values.dtype not in VALUE_TYPES:
        raise RacError(
            f"{values.dtype}: the kernels read bfloat16, float32, float16 and int8; keep it dense"
        )
    value_type = VALUE_TYPES[values.dtype]
    if bitmask is None:
        value_type = DENSE_TYPES[bits]
    elif values.dtype == torch.int8 and bits == 4:
        value_type = INT4
    if zeros is None and bits < 4:  # these always have codes of zero
        zeros = torch.full((shape[0], 1), 1 << (bits - 1), dtype=torch.uint8)
    return library_and_isa()[0].pack(
        values.detach().contiguous(),
        None if bitmask is None else bitmask.contiguous(),
        None if zeros is None else _panels(zeros),
        shape,
        value_type,
    )


def pack_scale(scale: Tensor, narrow: bool = False) -> Tensor:
    """Return scales [N, groups] as float32 [panels, groups, 16]; `narrow`: bfloat16 where exact."""
    packed = _panels(scale.float())
    exact = narrow and torch.equal(packed.bfloat16().float(), packed)
    return packed.bfloat16() if exact else packed


def _panels(by_row: Tensor) -> Tensor:
    """Return [N, groups] as [panels, groups, 16], with zeros for the rows that pad a panel."""
    rows, groups = by_row.shape
    padded = torch.nn.functional.pad(by_row, (0, 0, 0, -rows % PANEL))
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()
