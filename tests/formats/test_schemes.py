import pytest
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)

from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import MXFP4, NVFP4, Encoding
from rac_modifier.formats.schemes import describe_scheme, encoding_of, stored_encoding


def scheme(weights: dict | None, **parts) -> QuantizationScheme:
    return QuantizationScheme(
        targets=["Linear"],
        weights=None
        if weights is None
        else QuantizationArgs(**{"num_bits": 8, "strategy": "channel", **weights}),
        **{name: QuantizationArgs(**args) for name, args in parts.items()},
    )


CHANNEL, TOKEN = "one scale per channel", "one scale per token"


@pytest.mark.parametrize(
    ("preset", "grid", "text"),
    [
        ("W4A16", Encoding("int", 4, 128), "int4 in groups of 128"),
        ("W8A16", Encoding("int", 8), f"int8, {CHANNEL}"),
        ("W8A8", Encoding("int", 8), f"int8, {CHANNEL}, activations int8, {TOKEN}"),
        ("FP8_DYNAMIC", Encoding("float", 8), f"float8, {CHANNEL}, activations float8, {TOKEN}"),
    ],
)
def test_presets(preset, grid, text):
    upstream = preset_name_to_scheme(preset, ["Linear"])
    if preset == "W8A16":  # a channel or a group, by the version of compressed-tensors
        upstream.weights.strategy, upstream.weights.group_size = "channel", None
    assert encoding_of(upstream, "x", prunes=True) == grid
    assert describe_scheme(upstream) == text


PRUNED, DENSE = {"prunes": True}, {"prunes": False}
TOKENS = {"num_bits": 8, "dynamic": True, "strategy": "token"}
ROUNDED = {"input_activations": TOKENS}
STATIC = {"num_bits": 8, "dynamic": False, "strategy": "tensor"}
GROUP = {"strategy": "group", "group_size": 32}
ASYMMETRIC = {"symmetric": False}
REFUSED = [
    (ASYMMETRIC, {}, PRUNED, "q_proj: weights int8, .* per channel, with zero points, which"),
    ({"num_bits": 3}, {}, PRUNED, "weights int3, .* use int of 4 or 8 bits"),
    ({"num_bits": 4, "type": "float"}, {}, PRUNED, "weights float4"),
    ({"strategy": "tensor"}, {}, PRUNED, "scale per tensor cannot be rounded;"),
    ({**GROUP, "actorder": "weight"}, {}, PRUNED, "actorder weight cannot be rounded;"),
    ({**GROUP, "scale_dtype": "float8_e4m3fn"}, {}, PRUNED, "scales of torch.float8_e4m3fn"),
    (ASYMMETRIC, {}, DENSE, r"int8, .* use int of 2 to 8 bits \(2 to 7 with zero points"),
    ({**ASYMMETRIC, "type": "float"}, {}, DENSE, "float8, one scale per channel, with zero points"),
    (ASYMMETRIC, ROUNDED, DENSE, "which no kernel .* quantized activations; set symmetric: true"),
    (None, ROUNDED, PRUNED, "q_proj: its scheme has no weights; quantize"),
    *(
        ({}, {f"{side}_activations": STATIC}, PRUNED, "static scales .*; set dynamic: true")
        for side in ("input", "output")
    ),
]


@pytest.mark.parametrize(("weights", "parts", "prunes", "message"), REFUSED)
def test_what_cannot_be_rounded_is_refused(weights, parts, prunes, message):
    with pytest.raises(RacError, match=message):
        encoding_of(scheme(weights, **parts), "q_proj", **prunes)


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_zero_points_where_nothing_is_pruned(bits):
    asymmetric = scheme({"num_bits": bits, "strategy": "group", "group_size": 64, **ASYMMETRIC})
    grid = Encoding("int", bits, 64, symmetric=False)
    assert encoding_of(asymmetric, "x", prunes=False) == stored_encoding(asymmetric, "x") == grid
    assert describe_scheme(asymmetric) == f"int{bits} in groups of 64, with zero points"


ENCODINGS = {"NVFP4": NVFP4, "MXFP4": MXFP4}


@pytest.mark.parametrize(("preset", "size"), [("NVFP4", 16), ("MXFP4", 32)])
def test_4_bit_floats_where_nothing_is_pruned(preset, size):
    upstream = preset_name_to_scheme(f"{preset}A16", ["Linear"])
    assert encoding_of(upstream, "x", prunes=False) == stored_encoding(upstream, "x")
    assert stored_encoding(upstream, "x") == ENCODINGS[preset]
    assert describe_scheme(upstream).startswith(f"float4 in groups of {size}, scales of")
    activations = preset_name_to_scheme(preset, ["Linear"])
    if preset == "NVFP4":
        with pytest.raises(RacError, match=r"static scales .* \(NVFP4A16 instead of NVFP4"):
            encoding_of(activations, "x", prunes=False)
    else:
        assert encoding_of(activations, "x", prunes=False) == ENCODINGS[preset]
    for changes in ({"group_size": 64}, {"scale_dtype": None}, {"actorder": "static"}):
        other = upstream.model_copy(update={"weights": upstream.weights.model_copy(update=changes)})
        with pytest.raises(RacError, match=r"weights float4 .* or NVFP4A16 or MXFP4A16"):
            encoding_of(other, "x", prunes=False)


@pytest.mark.parametrize(
    "weights",
    [
        {**GROUP, "type": "float", "scale_dtype": "uint8"},
        ASYMMETRIC,
        {"strategy": "tensor"},
        {"num_bits": 4, "type": "float"},
    ],
)
def test_codes_that_cannot_be_trained_are_refused(weights):
    with pytest.raises(RacError, match=r"q_proj: .* cannot be trained through their codes"):
        stored_encoding(scheme(weights), "q_proj")
