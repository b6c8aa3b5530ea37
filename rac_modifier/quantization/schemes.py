"""llm-compressor's quantization schemes, and the grid of each scheme that can be rounded here."""

from typing import Literal

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from rac_modifier.errors import RacError
from rac_modifier.quantization.grid import Grid


def grid_of(scheme: QuantizationScheme, name: str, *, prunes: bool) -> Grid:
    """Return the grid of a scheme's weights (RacError); `prunes`: stored with a mask."""
    weights = scheme.weights
    if weights is None:
        raise RacError(
            f"{name}: its scheme has no weights; quantize activations with QuantizationModifier"
        )
    if not weights.symmetric and (prunes or scheme.input_activations is not None):
        raise RacError(
            f"{name}: weights {_describe(weights)}, which no kernel multiplies with a mask or with "
            "quantized activations; set symmetric: true (W4A16 instead of W4A16_ASYM)"
        )
    # integers that are stored with a mask, and without one
    bits = ((4, 8) if prunes else range(2, 9)) if weights.type == "int" else (8,)
    plain = weights.actorder is None and weights.scale_dtype is None and not weights.dynamic
    if not _is_stored_form(weights) or weights.num_bits not in bits or not plain:
        integers = "4 or 8 bits" if prunes else "2 to 8 bits (2 to 7 with zero points)"
        raise RacError(
            f"{name}: weights {_describe(weights)} cannot be rounded; use int of {integers}, or "
            "float of 8 (e4m3), symmetric, a scale per channel or group (W4A16)"
        )
    for args in (scheme.input_activations, scheme.output_activations):
        if args is not None and args.dynamic is not True:
            raise RacError(
                f"{name}: activations with static scales are not calibrated here; set dynamic: "
                "true (FP8_DYNAMIC instead of FP8)"
            )
    return _grid(weights)


def stored_grid(scheme: QuantizationScheme, name: str) -> Grid:
    """Return the grid of quantized weights, to train them through their codes (RacError: none)."""
    weights = scheme.weights
    assert weights is not None
    if not _is_stored_form(weights):
        raise RacError(
            f"{name}: weights {_describe(weights)} cannot be trained through their codes; recovery "
            "knows int of 2 to 8 bits (2 to 7 with zero points) and float of 8 (e4m3), one scale "
            "per channel or group. Recover the model before it is quantized"
        )
    return _grid(weights)


def describe_scheme(scheme: QuantizationScheme) -> str:
    """Describe a scheme: `int8, one scale per channel, activations int8, one scale per token`."""
    weights, inputs = scheme.weights, scheme.input_activations
    assert weights is not None
    return _describe(weights) + (f", activations {_describe(inputs)}" if inputs else "")


def _grid(weights: QuantizationArgs) -> Grid:
    group = weights.group_size if weights.strategy == "group" else None
    kind: Literal["int", "float"] = "float" if weights.type == "float" else "int"
    return Grid(kind, weights.num_bits, group, bool(weights.symmetric))


def _is_stored_form(weights: QuantizationArgs) -> bool:
    """Return whether a checkpoint can hold these codes: zero points of 8 bits are not exact."""
    if weights.type == "float":
        fits = weights.num_bits == 8 and weights.symmetric
    else:
        fits = 2 <= weights.num_bits <= (8 if weights.symmetric else 7)
    return bool(fits and weights.strategy in ("channel", "group"))


def _describe(weights: QuantizationArgs) -> str:
    grouped = weights.strategy == "group"
    scales = f" in groups of {weights.group_size}"
    return "".join(
        (
            f"{_text(weights.type)}{weights.num_bits}",
            scales if grouped else f", one scale per {_text(weights.strategy)}",
            "" if weights.symmetric else ", with zero points",
            f", actorder {_text(weights.actorder)}" if weights.actorder else "",
            f", scales of {weights.scale_dtype}" if weights.scale_dtype else "",
        )
    )


def _text(value: object) -> str:
    """Return the text of a field, which compressed-tensors holds as text or as an enum."""
    return str(getattr(value, "value", value))
