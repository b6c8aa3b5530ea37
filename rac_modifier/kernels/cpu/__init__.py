"""The CPU backend: whether its C++ kernels (csrc/) run a layer, packing, and the matmul."""

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight
from rac_modifier.kernels.cpu import operator
from rac_modifier.kernels.cpu.huge_pages import in_huge_pages
from rac_modifier.kernels.cpu.library import MOST_GROUP, PACKED_TYPES, PANEL, PackedType
from rac_modifier.kernels.cpu.support import Support, library_and_isa
from rac_modifier.kernels.cpu.support import support as machine_support
from rac_modifier.kernels.interface import Decision, Layer, stay_dense

DATA, SCALE = "weight_packed", "weight_packed_scale"  # vLLM's LoRA looks for the first name
_WIDENED = {torch.float16: torch.float32}  # packed as the second, exactly
_WORD_BYTES = 4  # a mask of 16 rows x 2 columns
_LEAST_CEILING = 1.1  # below this, a kernel would have to be perfect to gain anything


def packed_type(layer: Layer) -> tuple[PackedType, str] | str:
    """Return how a kernel reads the values, with a note on what differs; or why none does."""
    encoding, group = layer.encoding, layer.group
    if encoding.kind != "int":
        note = ""
        if encoding.is_scaled:
            if encoding.group_size is not None:
                return f"no kernel reads fp8 values in groups of {group}"
            note = "fp8 values as bfloat16, exactly"
        narrow = encoding.kind == "bfloat" and layer.served == torch.float32  # the same numbers
        dtype = torch.bfloat16 if note or narrow else _WIDENED.get(layer.served, layer.served)
        known = [each for each in PACKED_TYPES if each.dtype == dtype]
        return (known[0], note) if known else f"no sparse kernel reads {dtype}"
    if group < layer.columns and (group % 4 or group > MOST_GROUP):
        few = "only of a multiple of 4 up to 512"
        return f"no kernel reads values in groups of {group} columns, {few}"
    wide = [
        each
        for each in PACKED_TYPES
        if each.dtype == torch.int8
        and each.masked == (layer.density < 1.0)
        and each.bits >= encoding.bits
        and (group == layer.columns or group % each.unit == 0)
    ]
    chosen = min(wide, key=lambda each: each.bits)
    if chosen.bits == encoding.bits:
        return chosen, ""
    each_takes = {8: "one byte", 4: "four bits"}.get(chosen.bits, f"{chosen.bits} bits")
    return chosen, f"int{encoding.bits} values in groups of {group}, {each_takes} each"


def can_run(layer: Layer) -> Decision:
    """Decide for a kernel if it reads the values and the packed weight is 1.1 times smaller."""
    form = packed_type(layer)
    if isinstance(form, str):
        return stay_dense(form, layer.served)
    packed, note = form
    dense_bytes, bytes_per_weight = layer.served.itemsize, _bytes_per_weight(layer, packed)
    ceiling = dense_bytes / bytes_per_weight
    of_dense = f"instead of the {dense_bytes} of dense {str(layer.served).removeprefix('torch.')}"
    available = machine_support()
    reason = ""
    if available.isa is None:
        reason = available.reason
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
    kernel = _name(layer, packed, note, available)
    size = f"{bytes_per_weight:.2f} bytes per weight {of_dense}, at most {ceiling:.2f}x faster"
    return Decision(True, kernel, f"{kernel}: {size}", bytes_per_weight, dense_bytes)


def pack(weight: StoredWeight, served: torch.dtype) -> dict[str, Tensor]:
    """Return `weight_packed`, and `weight_packed_scale` of scaled values (RacError: no kernel)."""
    form = packed_type(Layer.of(weight, served))
    if isinstance(form, str):
        raise RacError(f"{weight.name}: {form}; keep it dense")
    packed, codes = form[0], form[0].bits < 8
    values = weight.values if packed.dtype == torch.int8 else weight.values.to(served)
    data = pack_values(
        values.to(packed.dtype),
        weight.bitmask if packed.masked else None,
        (weight.rows, weight.columns),
        packed.bits,
        weight.zeros if codes else None,
    )
    if packed.dtype == torch.int8 and weight.activation_bits == 8:
        library_and_isa()[0].set_activation_bits(data, 8)
    data = in_huge_pages(data)
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


def _name(layer: Layer, packed: PackedType, note: str, available: Support) -> str:
    """Return a name such as "sparse int8 kernel avx2", with what is unusual in brackets."""
    integers = packed.dtype == torch.int8
    notes = [note] if note else []
    if integers and layer.activation_bits == 8:
        refused = "activations in 16 bits, since it multiplies no bytes"
        notes.append("activations in 8 bits" if available.multiplies_bytes else refused)
    kernel = f"int{packed.bits} kernel {available.isa}" if integers else f"kernel {available.isa}"
    if packed.masked:
        kernel = f"sparse {kernel}"
    return f"{kernel} ({'; '.join(notes)})" if notes else kernel


def _bytes_per_weight(layer: Layer, packed: PackedType) -> float:
    panels, weights = -(-layer.rows // PANEL), layer.rows * layer.columns
    groups = layer.columns // layer.group
    scales = layer.group_bytes * panels * PANEL * groups if groups > 1 else 0
    if not packed.masked:
        values = panels * PANEL * -(-layer.columns // 64) * 64 * packed.bits // 8
        return (scales + values) / weights
    masks = panels * -(-layer.columns // 32) * 16 * _WORD_BYTES
    padding = 0.0
    if packed.bits < 8:  # half a byte in every second quad, where values are pruned at random
        padding = 0.25 * panels * -(-layer.columns // 4) if 0 < layer.density < 1 else 0.0
    return packed.bits / 8 * layer.density + (scales + masks + padding) / weights


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
    values = values.to(_WIDENED.get(values.dtype, values.dtype))
    takes = bits if values.dtype == torch.int8 else 8 * values.itemsize
    wanted = (values.dtype, takes, bitmask is not None)
    known = (each for each in PACKED_TYPES if (each.dtype, each.bits, each.masked) == wanted)
    packed = next(known, None)
    if packed is None:
        masked = "" if bitmask is not None else " without a mask"
        raise RacError(
            f"{values.dtype}{masked}: the kernels read bfloat16, float32, float16 and int8 (also "
            "without a mask); keep it dense"
        )
    if zeros is None and bits < 8 and bits != 4:  # these always have codes of zero
        zeros = torch.full((shape[0], 1), 1 << (bits - 1), dtype=torch.uint8)
    return library_and_isa()[0].pack(
        values.detach().contiguous(),
        None if bitmask is None else bitmask.contiguous(),
        None if zeros is None else _panels(zeros),
        shape,
        packed.number,
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
