"""Mistakes about quantization."""

from __future__ import annotations

from tests.bad_inputs.bench import Bench, Case, Cases

CASES = Cases()


def quantized(**weights: object) -> dict[str, object]:
    """Settings with one config group of such weights."""
    return {"quantization": {"config_groups": {"g": {"weights": weights}}}}


CASES += [
    Case(
        "a config group that compressed-tensors refuses",
        "config_groups.g: 1 validation error for QuantizationScheme",
        lambda b: b.prune_with(**quantized(num_bits=4, strategy="group")),
    ),
]


@CASES.case(
    "a quantization modifier after pruning with quantization",
    "would quantize twice; leave one of them out",
)
def _(b: Bench) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    later = QuantizationModifier(scheme="W8A8", targets=["Linear"], ignore=["lm_head"])
    b.prune(later=(later,), settings={"quantization": {"scheme": "W8A8"}})


@CASES.case(
    "an asymmetric QuantizationModifier after pruning, packed", "quantize with a symmetric scheme"
)
def _(b: Bench) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    }
    b.prune(
        later=(QuantizationModifier(config_groups={"g": group}, ignore=["lm_head"]),),
        output_dir=str(b.tmp / "out"),
    )


@CASES.case(
    "both of this package's modifiers in one recipe", "which calibrates the whole recipe: leave"
)
def _(b: Bench) -> None:
    from rac_modifier import ReasoningAwareCalibrationModifier

    b.prune(later=(ReasoningAwareCalibrationModifier(traces={"store": str(b.store)}),))
