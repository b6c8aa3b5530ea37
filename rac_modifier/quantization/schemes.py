"""llm-compressor's quantization schemes, and the grid of each scheme that can be rounded here."""

from __future__ import annotations

from collections.abc import Collection

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from rac_modifier.errors import RacError
from rac_modifier.quantization.grid import Grid

_KNOWN = "or float of 8 (e4m3), symmetric, one scale per channel or group, such as W4A16, W8A8 or FP8_DYNAMIC"
_SPARSE_BITS, _DENSE_BITS = (
    (4, 8),
    range(2, 9),
)  # of integers: those that are stored with a mask, and without one


def grid_of(scheme: QuantizationScheme, name: str, *, prunes: bool) -> Grid:
    """The grid of a scheme's weights; `prunes` says whether they will be stored with a mask.

    Raises:
        RacError: naming `name`, when this package cannot round to it, or when activations need calibrated scales.
    """
    weights = scheme.weights
    if weights is None:
        raise RacError(
            f"{name}: its scheme has no weights; quantize activations alone with a QuantizationModifier"
        )
    if not weights.symmetric and (prunes or scheme.input_activations is not None):
        why = (
            "sparse kernels take a pruned weight for the code 0"
            if prunes
            else "no kernel multiplies them with quantized activations"
        )
        raise RacError(
            f"{name}: weights {_describe(weights)}, so a zero is its zero point, and {why}; set symmetric: true (W4A16 in place "
            "of W4A16_ASYM)"
        )
    if not _is_known(weights, _SPARSE_BITS if prunes else _DENSE_BITS):
        bits = (
            "4 or 8 bits"
            if prunes
            else "2 to 8 bits (2 to 7 with zero points: bfloat16 does not hold the values of 8)"
        )
        raise RacError(
            f"{name}: weights {_describe(weights)} cannot be rounded here; use int of {bits}, {_KNOWN}"
        )
    for part in ("input_activations", "output_activations"):
        args = getattr(scheme, part)
        if args is not None and args.dynamic is not True:
            raise RacError(
                f"{name}: {part} with static scales are not calibrated here; set dynamic: true (FP8_DYNAMIC in place of FP8)"
            )
    return _grid(weights)


def stored_grid(scheme: QuantizationScheme, name: str) -> Grid:
    """The grid of weights that are quantized already, to train them through their codes: int of 2 to 8 bits, or float of 8.

    With zero points int of 2 to 7 bits: bfloat16 does not hold the values of 8.

    Raises:
        RacError: naming `name`, for a grid that has one scale per tensor or block, or other numbers.
    """
    weights = scheme.weights
    assert weights is not None
    is_float = _text(weights.type) == "float"
    numbers = (
        weights.num_bits == 8
        if is_float
        else 2 <= weights.num_bits <= (8 if weights.symmetric else 7)
    )
    if (
        not numbers
        or weights.strategy not in ("channel", "group")
        or (is_float and not weights.symmetric)
    ):
        raise RacError(
            f"{name}: weights {_describe(weights)} cannot be trained through their codes; recovery knows int of 2 to 8 bits "
            "(2 to 7 with zero points) and float of 8 (e4m3), one scale per channel or group. Recover the model before it is "
            "quantized"
        )
    return _grid(weights)


def describe_scheme(scheme: QuantizationScheme) -> str:
    """A scheme in a few words: `int8, one scale per channel, activations int8, one scale per token`."""
    weights, inputs = scheme.weights, scheme.input_activations
    assert weights is not None
    scales = f", one scale per {_text(weights.strategy)}"
    if weights.strategy == "group":
        scales = f" in groups of {weights.group_size}"
    zeros = "" if weights.symmetric else ", with zero points"
    text = f"{_text(weights.type)}{weights.num_bits}{scales}{zeros}"
    if inputs is None:
        return text
    return f"{text}, activations {_text(inputs.type)}{inputs.num_bits}, one scale per {_text(inputs.strategy)}"


def _grid(weights: QuantizationArgs) -> Grid:
    group = weights.group_size if weights.strategy == "group" else None
    return Grid(
        "float" if weights.type == "float" else "int",
        weights.num_bits,
        group,
        bool(weights.symmetric),
    )


def _is_known(weights: QuantizationArgs, bits: Collection[int]) -> bool:
    return (
        weights.num_bits in (bits if weights.type == "int" else (8,))
        and weights.strategy in ("channel", "group")
        and bool(weights.symmetric or (weights.type == "int" and weights.num_bits < 8))
        and weights.actorder is None
        and weights.scale_dtype is None
        and not weights.dynamic
    )


def _describe(weights: QuantizationArgs) -> str:
    parts = [
        f"{_text(weights.type)} of {weights.num_bits} bits",
        f"strategy {_text(weights.strategy)}",
    ]
    parts += [] if weights.symmetric else ["asymmetric"]
    parts += [f"actorder {_text(weights.actorder)}"] if weights.actorder else []
    parts += [f"scales of {weights.scale_dtype}"] if weights.scale_dtype else []
    return ", ".join(parts)


def _text(value: object) -> str:
    """compressed-tensors' fields hold text or members of an enum, depending on how a scheme was made."""
    return str(getattr(value, "value", value))
