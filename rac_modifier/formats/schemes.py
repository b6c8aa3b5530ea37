"""llm-compressor's quantization schemes, and the grid of each scheme that can be rounded here."""

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import MXFP4, NVFP4, Encoding

_GROUPED = ("group", "tensor_group")
# The encodings with coarse scales, by strategy, group size and dtype of the scales.
_COARSE = {
    ("tensor_group", 16, torch.float8_e4m3fn): NVFP4,
    ("group", 32, torch.uint8): MXFP4,
}


def encoding_of(scheme: QuantizationScheme, name: str, *, prunes: bool) -> Encoding:
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
    encoding = _encoding(weights)
    usable = encoding is not None and (encoding.can_be_sparse or not prunes)
    rounded = encoding in _COARSE.values() or (weights.scale_dtype is None and not weights.dynamic)
    if encoding is None or not usable or not rounded or weights.actorder is not None:
        integers = "4 or 8 bits" if prunes else "2 to 8 bits (2 to 7 with zero points)"
        unpruned = "" if prunes else ", or NVFP4A16 or MXFP4A16"
        raise RacError(
            f"{name}: weights {_describe(weights)} cannot be rounded; use int of {integers}, or "
            f"float of 8 (e4m3), symmetric, a scale per channel or group (W4A16){unpruned}"
        )
    for args in (scheme.input_activations, scheme.output_activations):
        if args is not None and args.dynamic is not True:
            raise RacError(
                f"{name}: activations with static scales are not calibrated here; set dynamic: "
                "true (FP8_DYNAMIC instead of FP8), or leave them out (NVFP4A16 instead of NVFP4)"
            )
    return encoding


def stored_encoding(scheme: QuantizationScheme, name: str) -> Encoding:
    """Return the grid of quantized weights, to train them through their codes (RacError: none)."""
    weights = scheme.weights
    assert weights is not None
    encoding = _encoding(weights)
    if encoding is None:
        raise RacError(
            f"{name}: weights {_describe(weights)} cannot be trained through their codes; recovery "
            "knows int of 2 to 8 bits (2 to 7 with zero points), float of 8 (e4m3), one scale per "
            "channel or group, NVFP4 and MXFP4. Recover the model before it is quantized"
        )
    return encoding


def describe_scheme(scheme: QuantizationScheme) -> str:
    """Describe a scheme: `int8, one scale per channel, activations int8, one scale per token`."""
    weights, inputs = scheme.weights, scheme.input_activations
    assert weights is not None
    return _describe(weights) + (f", activations {_describe(inputs)}" if inputs else "")


def _encoding(weights: QuantizationArgs) -> Encoding | None:
    """Return the encoding that a checkpoint holds; None: it has none for these weights."""
    form = (_text(weights.strategy), weights.group_size, weights.scale_dtype)
    if weights.type == "float" and weights.num_bits == 4:  # a dynamic scale is not stored
        return None if weights.dynamic or not weights.symmetric else _COARSE.get(form)
    plain = weights.scale_dtype is None or weights.scale_dtype.itemsize > 1
    if not plain or weights.strategy not in ("channel", "group"):
        return None
    group = weights.group_size if weights.strategy == "group" else None
    if weights.type == "float":
        return Encoding("float", 8, group) if weights.num_bits == 8 and weights.symmetric else None
    # zero points of 8 bits are not exact
    fits = 2 <= weights.num_bits <= (8 if weights.symmetric else 7)
    return Encoding("int", weights.num_bits, group, bool(weights.symmetric)) if fits else None


def _describe(weights: QuantizationArgs) -> str:
    grouped = weights.strategy in _GROUPED
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
