"""Mistakes about quantization."""

from __future__ import annotations

from tests.bad_inputs.bench import Bench, Case, Cases

CASES = Cases()


def quantized(**weights: object) -> dict[str, object]:
    """Settings with one config group of such weights."""
    return {"quantization": {"config_groups": {"g": {"weights": weights}}}}


CASES += [
    Case(
        "`quantization` without a scheme",
        "set either scheme or config_groups",
        lambda b: b.check(quantization={}),
    ),
    Case(
        "a scheme that is no preset",
        "scheme 'W4': no preset of llm-compressor",
        lambda b: b.check(quantization={"scheme": "W4"}),
    ),
    Case(
        "a setting of a config group that compressed-tensors does not have",
        "config_groups.g.weights.bits: compressed-tensors has no such setting (value 4); use num_bits",
        lambda b: b.check(**quantized(num_bits=4, bits=4)),
    ),
    Case(
        "an observer, where scales are searched for",
        "config_groups.g.weights.observer: 'mse' has no effect here: scales are searched for, and no observer runs; leave it",
        lambda b: b.check(**quantized(num_bits=8, observer="mse")),
    ),
    Case(
        "a config group that compressed-tensors refuses",
        "config_groups.g: 1 validation error for QuantizationScheme",
        lambda b: b.prune_with(**quantized(num_bits=4, strategy="group")),
    ),
    Case(
        "an asymmetric scheme inside the pruning entry",
        "asymmetric, so a zero is its zero point, and sparse kernels take a pruned weight for the code 0; set symmetric: true",
        lambda b: b.prune_with(quantization={"scheme": "W4A16_ASYM"}),
    ),
    Case(
        "zero points beside quantized activations",
        "no kernel multiplies them with quantized activations; set symmetric: true",
        lambda b: b.prune_with(
            solver="none",
            mask_structure=None,
            quantization={
                "config_groups": {
                    "g": {
                        "weights": {"num_bits": 8, "strategy": "channel", "symmetric": False},
                        "input_activations": {"num_bits": 8, "strategy": "token", "dynamic": True},
                    }
                }
            },
        ),
    ),
    Case(
        "an order of columns where weights are rounded here",
        "weights.actorder: 'static' has no effect here: dense weights are rounded in the order of falling second moments",
        lambda b: b.check(
            **quantized(num_bits=4, strategy="group", group_size=32, actorder="static")
        ),
    ),
    Case(
        "a scheme with static activation scales inside the pruning entry",
        "input_activations with static scales are not calibrated here; set dynamic: true",
        lambda b: b.prune_with(
            quantization={
                "config_groups": {
                    "g": {
                        "weights": {"num_bits": 8, "strategy": "channel"},
                        "input_activations": {"num_bits": 8, "strategy": "tensor"},
                    }
                }
            }
        ),
    ),
    Case(
        "groups that do not divide a layer's inputs",
        "64 inputs are no multiple of the group_size 128",
        lambda b: b.prune_with(quantization={"scheme": "W4A16"}),
    ),
    Case(
        "a scheme whose targets are not pruned",
        "quantization: its targets match none of the modules of this entry",
        lambda b: b.prune_with(quantization={"scheme": {"W8A8": ["lm_head"]}}),
    ),
    Case(
        "`solver: keep` for a model without zeros",
        "solver: keep keeps the zeros that a model has, and this module lacks them",
        lambda b: b.prune_with(solver="keep"),
    ),
    Case(
        "`solver: none` without quantization",
        "solver: none prunes nothing, and without quantization nothing is left to do",
        lambda b: b.rac(
            "prune", b.folder, b.tmp / "out", "--recipe", "rac_w4a16", "--set", "quantization=null"
        ),
    ),
    Case(
        "int of 3 bits where weights are pruned",
        "int of 3 bits, strategy group cannot be rounded here; use int of 4 or 8 bits",
        lambda b: b.prune_with(
            quantization={
                "config_groups": {
                    "g": {"weights": {"num_bits": 3, "strategy": "group", "group_size": 32}}
                }
            }
        ),
    ),
    Case(
        "bits of activations, for weights that are floats",
        "quantization.int8_activation_limit: 0.01 has no effect beside weights that are floats",
        lambda b: b.check(quantization={"scheme": "FP8_DYNAMIC", "int8_activation_limit": 0.01}),
    ),
    Case(
        "bits of activations, without held-out traces",
        "quantization.int8_activation_limit: 0.01 has no effect beside calibration.held_out_tokens: 0",
        lambda b: b.check(
            quantization={"scheme": "W8A16", "int8_activation_limit": 0.01},
            calibration={"held_out_tokens": 0},
        ),
    ),
    Case(
        "bits of activations, in a checkpoint that is not packed",
        "quantization.int8_activation_limit: 0.01 has no effect beside storage: dense",
        lambda b: b.check(
            storage="dense", quantization={"scheme": "W8A16", "int8_activation_limit": 0.01}
        ),
    ),
]


@CASES.case(
    "GPTQModifier after pruning",
    "GPTQModifier after ReasoningAwareSparseGPTModifier fills pruned weights again",
)
def _(b: Bench) -> None:
    from llmcompressor.modifiers.quantization import GPTQModifier

    b.prune(later=(GPTQModifier(scheme="W8A8", targets=["Linear"], ignore=["lm_head"]),))


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
    "ReasoningAwareCalibrationModifier alone",
    "ReasoningAwareCalibrationModifier calibrates nothing: the recipe has",
)
def _(b: Bench) -> None:
    from llmcompressor import oneshot

    from rac_modifier import ReasoningAwareCalibrationModifier

    oneshot(
        model=str(b.folder),
        recipe=ReasoningAwareCalibrationModifier(traces={"store": str(b.store)}),
    )


@CASES.case(
    "both of this package's modifiers in one recipe", "which calibrates the whole recipe: leave"
)
def _(b: Bench) -> None:
    from rac_modifier import ReasoningAwareCalibrationModifier

    b.prune(later=(ReasoningAwareCalibrationModifier(traces={"store": str(b.store)}),))


@CASES.case(
    "`recover:` beside a modifier that changes more than codes",
    "recover beside SmoothQuantModifier",
)
def _(b: Bench) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    from rac_modifier import ReasoningAwareCalibrationModifier

    recipe = [
        ReasoningAwareCalibrationModifier(traces={"store": str(b.store)}, recover={}),
        SmoothQuantModifier(),
    ]
    oneshot(model=str(b.folder), recipe=recipe)


@CASES.case(
    "`recover:` where the head is quantized",
    "lm_head is to be quantized; embeddings and head are not trained",
)
def _(b: Bench) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    from rac_modifier import ReasoningAwareCalibrationModifier
    from tests.llmcompressor.modifier_helpers import int4

    recipe = [
        ReasoningAwareCalibrationModifier(traces={"store": str(b.store)}, recover={}),
        GPTQModifier(**int4()),
    ]
    oneshot(model=str(b.folder), recipe=recipe)


@CASES.case(
    "`rac schema` of a modifier that is not this package's", "is none of this package's modifiers"
)
def _(b: Bench) -> None:
    b.rac("schema", "GPTQModifier")
