import pytest
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    preset_name_to_scheme,
)

from rac_modifier.errors import RacError
from rac_modifier.quantization.grid import Grid
from rac_modifier.quantization.schemes import describe_scheme, grid_of


def scheme(weights: dict | None, **parts) -> QuantizationScheme:
    return QuantizationScheme(
        targets=["Linear"],
        weights=None
        if weights is None
        else QuantizationArgs(**{"num_bits": 8, "strategy": "channel", **weights}),
        **{name: QuantizationArgs(**args) for name, args in parts.items()},
    )


@pytest.mark.parametrize(
    ("preset", "grid", "text"),
    [
        ("W4A16", Grid("int", 4, 128), "int4 in groups of 128"),
        ("W8A16", Grid("int", 8), "int8, one scale per channel"),
        (
            "W8A8",
            Grid("int", 8),
            "int8, one scale per channel, activations int8, one scale per token",
        ),
        (
            "FP8_DYNAMIC",
            Grid("float", 8),
            "float8, one scale per channel, activations float8, one scale per token",
        ),
    ],
)
def test_presets(preset, grid, text):
    found = preset_name_to_scheme(preset, ["Linear"])
    if preset == "W8A16":  # a channel or a group, by the version of compressed-tensors
        found.weights.strategy, found.weights.group_size = "channel", None
    assert grid_of(found, "x", prunes=True) == grid
    assert describe_scheme(found) == text


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            {"symmetric": False},
            r"q_proj: weights int of 8 bits, strategy channel, asymmetric, so a zero is its zero point, and sparse kernels take",
        ),
        ({"num_bits": 3}, "weights int of 3 bits"),
        (
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            "weights float of 4 bits",
        ),
        ({"strategy": "tensor"}, "strategy tensor cannot be rounded here"),
        (
            {"strategy": "group", "group_size": 32, "actorder": "weight"},
            "actorder weight cannot be rounded here",
        ),
        (
            {"strategy": "group", "group_size": 32, "scale_dtype": "float8_e4m3fn"},
            "scales of torch.float8_e4m3fn",
        ),
    ],
)
def test_weights_that_cannot_be_rounded_are_refused(weights, message):
    with pytest.raises(RacError, match=message):
        grid_of(scheme(weights), "q_proj", prunes=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_zero_points_where_nothing_is_pruned(bits):
    found = scheme({"num_bits": bits, "symmetric": False, "strategy": "group", "group_size": 64})
    assert grid_of(found, "x", prunes=False) == Grid("int", bits, 64, symmetric=False)
    assert describe_scheme(found) == f"int{bits} in groups of 64, with zero points"


@pytest.mark.parametrize(
    ("weights", "parts", "message"),
    [
        (
            {},
            {},
            r"int of 8 bits, .* use int of 2 to 8 bits \(2 to 7 with zero points: bfloat16 does not hold the values of 8",
        ),
        (
            {"type": "float"},
            {},
            "weights float of 8 bits, strategy channel, asymmetric cannot be rounded here; use int of",
        ),
        (
            {},
            {"input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"}},
            "no kernel multiplies them with quantized activations; set symmetric: true",
        ),
    ],
)
def test_zero_points_that_nothing_reads_are_refused(weights, parts, message):
    with pytest.raises(RacError, match=message):
        grid_of(scheme({"symmetric": False, **weights}, **parts), "x", prunes=False)


def test_a_scheme_without_weights_is_refused():
    activations = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    with pytest.raises(
        RacError, match="q_proj: its scheme has no weights; quantize activations alone with a Quant"
    ):
        grid_of(scheme(None, input_activations=activations), "q_proj", prunes=True)


@pytest.mark.parametrize("part", ["input_activations", "output_activations"])
def test_activation_scales_that_need_calibration_are_refused(part):
    static = scheme(
        {"num_bits": 8}, **{part: {"num_bits": 8, "dynamic": False, "strategy": "tensor"}}
    )
    with pytest.raises(
        RacError,
        match=rf"q_proj: {part} with static scales are not calibrated here; set dynamic: true",
    ):
        grid_of(static, "q_proj", prunes=True)
