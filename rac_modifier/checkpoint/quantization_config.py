"""What config.json says about quantization, and weights in int32 words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.int32_words import BITS, pack_words, unpack_words, word_count
from rac_modifier.errors import RacError
from rac_modifier.settings.check import check_names

PACK_QUANTIZED = "pack-quantized"
# What a module stores instead of `weight` where its format is pack-quantized.
WORDS, WORDS_SHAPE = "weight_packed", "weight_shape"
# Tensors that no symmetric scheme has: with them a zero weight is not stored as the value 0.
ASYMMETRIC = ("weight_zero_point", "weight_g_idx", "weight_global_scale")


@dataclass(frozen=True)
class WeightScheme:
    """How a config group stores weights; `group_size` None: a scale per row or tensor."""

    kind: str
    bits: int
    strategy: str
    group_size: int | None
    symmetric: bool
    format: str
    activations: str | None

    def describe(self) -> str:
        """Describe the scheme in a few words, such as `int4 in groups of 128 (pack-quantized)`."""
        groups = self.strategy == "group"
        scales = f"in groups of {self.group_size}" if groups else f"one scale per {self.strategy}"
        asymmetric = "" if self.symmetric else ", asymmetric"
        text = f"{self.kind}{self.bits} {scales}{asymmetric} ({self.format})"
        return f"{text}, activations {self.activations}" if self.activations else text


def weight_schemes(quantization: object) -> tuple[WeightScheme, ...]:
    """List the schemes of weights in a `quantization_config` (any value of a file).

    Raises:
        RacError: config groups that are malformed.
    """
    groups = quantization.get("config_groups") if isinstance(quantization, Mapping) else None
    if not groups:
        return ()
    assert isinstance(quantization, Mapping)
    try:
        schemes = [
            _scheme(group, quantization) for group in groups.values() if group.get("weights")
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise RacError(
            f"config.json: the config_groups of quantization_config are malformed ({error!r}); "
            "restore the config.json that was saved with the weights"
        ) from error
    check_names(quantization.get("ignore") or (), "config.json: ignore of quantization_config")
    for name, group in groups.items():
        check_names(group.get("targets") or (), f"config.json: targets of config group {name!r}")
    return tuple(dict.fromkeys(schemes))


def _scheme(group: Mapping[str, Any], quantization: Mapping[str, Any]) -> WeightScheme:
    weights, inputs = group["weights"], group.get("input_activations")
    group_size = weights.get("group_size")
    bits = weights["num_bits"]
    for name, value in {"num_bits": bits, "group_size": group_size}.items():
        if value is not None and (type(value) is not int or not -1 <= value < 1 << 31):
            raise ValueError(f"{name} is {value!r:.50}")
    activations = None
    if inputs:
        kind, strategy = inputs.get("type", "int"), inputs.get("strategy")
        activations = f"{kind}{inputs.get('num_bits', 8)} per {strategy}"
    return WeightScheme(
        kind=str(weights.get("type", "int")),
        bits=int(bits),
        strategy=str(weights.get("strategy") or ("group" if group_size else "tensor")),
        group_size=group_size,
        symmetric=bool(weights.get("symmetric", True)),
        format=str(group.get("format") or quantization.get("format")),
        activations=activations,
    )


def check_symmetric(tensor_names: Mapping[str, Any], name: str) -> None:
    """Refuse a quantized module whose zeros are not stored as zeros.

    Raises:
        RacError: naming the tensor that shows it.
    """
    for part in ASYMMETRIC:
        if f"{name}.{part}" in tensor_names:
            raise RacError(
                f"{name}: has a {part}, so its zeros are not stored as zeros and cannot be "
                "left out; quantize with a symmetric scheme (symmetric: true, such as W4A16 "
                "instead of W4A16_ASYM), or set storage: dense"
            )


def quantized_weight(
    parts: Mapping[str, Tensor], name: str, schemes: tuple[WeightScheme, ...] = ()
) -> tuple[Tensor, int]:
    """Return int8 [N, K] and bits per value of `weight_packed` and `weight_shape`.

    The bits are those of `schemes` that the number of words fits (without schemes: 4 or 8).

    Raises:
        RacError: parts that contradict each other, or values of another width.
    """
    words, shape = parts[WORDS], parts[WORDS_SHAPE]
    rows, columns = _shape_of(shape, name)
    if words.dim() != 2 or rows != words.shape[0]:
        raise RacError(
            f"{name}.{WORDS}: {list(words.shape)} does not fit {WORDS_SHAPE} {[rows, columns]}; "
            "the checkpoint is damaged"
        )
    widths = {scheme.bits for scheme in schemes if scheme.format == PACK_QUANTIZED} or set(BITS)
    fitting = [bits for bits in sorted(widths) if words.shape[1] == word_count(columns, bits)]
    if len(fitting) != 1:
        known = " or ".join(map(str, sorted(widths)))
        raise RacError(
            f"{name}.{WORDS}: {words.shape[1]} int32 words per row do not hold {columns} values of "
            f"{known} bits; the checkpoint is damaged, or quantized to another number of bits"
        )
    return unpack_words(words, fitting[0], columns), fitting[0]


def _shape_of(shape: Tensor, name: str) -> tuple[int, int]:
    """Return N and K of a `weight_shape`; refuse what is no shape of a matrix."""
    sizes = shape.flatten()[:4].tolist()
    if shape.is_floating_point() or len(sizes) != 2 or min(sizes) < 1:
        raise RacError(
            f"{name}.{WORDS_SHAPE}: {shape.dtype} {sizes} is not the shape of a matrix; "
            "the checkpoint is damaged"
        )
    return sizes[0], sizes[1]


def check_unambiguous(schemes: tuple[WeightScheme, ...]) -> None:
    """Refuse 8-bit integers in int32 words next to plain int8: packed, both look the same.

    Raises:
        RacError: both are there.
    """
    formats = {scheme.format for scheme in schemes if (scheme.kind, scheme.bits) == ("int", 8)}
    if PACK_QUANTIZED in formats and len(formats) > 1:
        raise RacError(
            f"int8 weights in the formats {' and '.join(sorted(formats))} cannot be stored "
            "sparse in one checkpoint; quantize activations in all of these config groups "
            "or in none, or set storage: dense"
        )


def stores_words(compressed_bits: int, schemes: tuple[WeightScheme, ...]) -> bool:
    """Tell whether upstream stores dense weights of these bits in int32 words."""
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
    """Return int8 [N, K] and bits per value of a module that is stored in int32 words.

    None: a layout that is not read here: no `weight_shape`, other bits, or words that hold
    whole values only.

    Raises:
        RacError: a tensor that cannot be read, or one that contradicts config.json.
    """
    names = [f"{module}.{part}" for part in (WORDS, WORDS_SHAPE)]
    if not all(name in files for name in names) or files.dtype(names[0]) != torch.int32:
        return None
    parts = {part: files.tensor(f"{module}.{part}") for part in (WORDS, WORDS_SHAPE)}
    bits = [scheme.bits for scheme in schemes if scheme.format == PACK_QUANTIZED]
    try:
        return quantized_weight(parts, module, schemes)
    except RacError:
        words, columns = parts[WORDS], _shape_of(parts[WORDS_SHAPE], module)[1]
        if not bits or not set(bits) <= {2, 3, *BITS}:
            return None
        # upstream up to 0.17 kept values of 3 bits within words, ten in each
        within = {-(-columns // (32 // width)) for width in bits if 32 % width}
        if words.dim() == 2 and words.shape[1] in within:
            return None
        raise
