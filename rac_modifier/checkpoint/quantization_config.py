"""What config.json says about quantization: its one reader, and weights that upstream packed into int32 words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.int32_words import BITS, pack_words, unpack_words, word_count
from rac_modifier.errors import RacError

PACK_QUANTIZED = "pack-quantized"
# What a module stores instead of `weight` where its format is pack-quantized.
WORDS, WORDS_SHAPE = "weight_packed", "weight_shape"
# Tensors that no symmetric scheme has: with them a zero weight is not stored as the value 0.
ASYMMETRIC = ("weight_zero_point", "weight_g_idx", "weight_global_scale")


@dataclass(frozen=True)
class WeightScheme:
    """How a config group stores weights; with `group_size` None there is one scale per row or tensor (`strategy`)."""

    kind: str
    bits: int
    strategy: str
    group_size: int | None
    symmetric: bool
    format: str
    activations: str | None

    def describe(self) -> str:
        """In a few words, such as `int4 in groups of 128 (pack-quantized)`."""
        scales = (
            f"in groups of {self.group_size}"
            if self.strategy == "group"
            else f"one scale per {self.strategy}"
        )
        text = f"{self.kind}{self.bits} {scales}{'' if self.symmetric else ', asymmetric'} ({self.format})"
        return f"{text}, activations {self.activations}" if self.activations else text


def weight_schemes(quantization: object) -> tuple[WeightScheme, ...]:
    """The schemes that quantize weights in a `quantization_config` (any value, as it is in the file); often none.

    Raises:
        RacError: config groups that are malformed.
    """
    groups = quantization.get("config_groups") if isinstance(quantization, Mapping) else None
    if not groups:
        return ()
    assert isinstance(quantization, Mapping)
    try:
        found = [_scheme(group, quantization) for group in groups.values() if group.get("weights")]
    except (AttributeError, KeyError, TypeError) as error:
        raise RacError(
            f"config.json: the config_groups of quantization_config are malformed ({error!r})"
        ) from error
    return tuple(dict.fromkeys(found))


def _scheme(group: Mapping[str, Any], quantization: Mapping[str, Any]) -> WeightScheme:
    weights, inputs = group["weights"], group.get("input_activations")
    return WeightScheme(
        kind=str(weights.get("type", "int")),
        bits=int(weights["num_bits"]),
        strategy=str(
            weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
        ),
        group_size=weights.get("group_size"),
        symmetric=bool(weights.get("symmetric", True)),
        format=str(group.get("format") or quantization.get("format")),
        activations=f"{inputs.get('type', 'int')}{inputs.get('num_bits', 8)} per {inputs.get('strategy')}"
        if inputs
        else None,
    )


def check_symmetric(tensor_names: Mapping[str, Any], name: str) -> None:
    """Refuse a quantized module whose zeros are not stored as zeros.

    Raises:
        RacError: naming the tensor that shows it.
    """
    for part in ASYMMETRIC:
        if f"{name}.{part}" in tensor_names:
            raise RacError(
                f"{name}: has a {part}, so its zeros are not stored as zeros and cannot be left out; quantize with a symmetric "
                "scheme (symmetric: true, such as W4A16 in place of W4A16_ASYM), or set storage: dense"
            )


def quantized_weight(
    parts: Mapping[str, Tensor], name: str, schemes: tuple[WeightScheme, ...] = ()
) -> tuple[Tensor, int]:
    """Int8 [N, K] and bits per value, for a module that stores `weight_packed` and `weight_shape`.

    The bits are those that the number of words fits, among those of the schemes (without schemes: all that can be packed).

    Raises:
        RacError: parts that contradict each other, or values of another width than 4 or 8 bits.
    """
    words, shape = parts[WORDS], parts[WORDS_SHAPE]
    if words.dim() != 2 or shape.numel() != 2 or shape.flatten()[0] != words.shape[0]:
        raise RacError(
            f"{name}.{WORDS}: {list(words.shape)} does not fit {WORDS_SHAPE} {shape.flatten().tolist()}"
        )
    columns = int(shape.flatten()[1])
    widths = {scheme.bits for scheme in schemes if scheme.format == PACK_QUANTIZED} or set(BITS)
    fitting = [bits for bits in sorted(widths) if words.shape[1] == word_count(columns, bits)]
    if len(fitting) != 1:
        raise RacError(
            f"{name}: {words.shape[1]} int32 words per row do not hold {columns} values of {' or '.join(map(str, BITS))} "
            "bits; the checkpoint is damaged, or quantized to another number of bits"
        )
    return unpack_words(words, fitting[0], columns), fitting[0]


def check_unambiguous(schemes: tuple[WeightScheme, ...]) -> None:
    """Refuse 8-bit integers in int32 words beside plain int8: packed sparse, the two kinds of module look the same.

    Raises:
        RacError: both are there.
    """
    formats = {scheme.format for scheme in schemes if (scheme.kind, scheme.bits) == ("int", 8)}
    if PACK_QUANTIZED in formats and len(formats) > 1:
        raise RacError(
            f"int8 weights in the formats {' and '.join(sorted(formats))} cannot be stored sparse in one checkpoint; quantize "
            "activations in all of these config groups or in none, or set storage: dense"
        )


def stores_words(compressed_bits: int, schemes: tuple[WeightScheme, ...]) -> bool:
    """Whether upstream stores dense weights of so many bits in int32 words in this checkpoint (pack-quantized)."""
    return any(
        s.format == PACK_QUANTIZED and s.kind == "int" and s.bits == compressed_bits
        for s in schemes
    )


def to_words(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """`weight_packed` and `weight_shape` of an int8 weight [N, K], as upstream stores them."""
    rows, columns = weight.shape
    return {
        WORDS: pack_words(weight, bits),
        WORDS_SHAPE: weight.new_tensor([rows, columns], dtype=torch.int64),
    }


def words_weight(
    files: TensorFiles, module: str, schemes: tuple[WeightScheme, ...]
) -> tuple[Tensor, int] | None:
    """Int8 [N, K] and bits per value of a module that is stored in int32 words; None for a layout that is not read here.

    Raises:
        RacError: a tensor that cannot be read.
    """
    names = [f"{module}.{part}" for part in (WORDS, WORDS_SHAPE)]
    if not all(name in files for name in names) or files.dtype(names[0]) != torch.int32:
        return None
    parts = {part: files.tensor(f"{module}.{part}") for part in (WORDS, WORDS_SHAPE)}
    try:
        return quantized_weight(parts, module, schemes)
    except RacError:
        return None
