"""Mistakes in a recipe: pattern, targets, calibration, quantization, modifiers."""

import yaml

from tests.bad_inputs.bench import Bench, Case, Cases
from tests.tiny import NAME

CASES = Cases()
UNSTRUCTURED = {"mask_structure": "0:0", "sparsity": 0.5}

CASES += [
    Case(
        "`sparsity: 1.7`",
        "sparsity 1.7: must lie strictly between 0 and 1",
        lambda b: b.check(mask_structure="0:0", sparsity=1.7),
    ),
    Case(
        '`mask_structure: "5:4"`',
        'mask_structure "5:4": prunes 5 of every 4',
        lambda b: b.check(mask_structure="5:4"),
    ),
    Case(
        "`mask_structure: 2:4` without quotes",
        'mask_structure: 124 is what YAML reads 2:4 as; write "2:4", in quotes',
        lambda b: b.check(mask_structure=yaml.safe_load("2:4")),
    ),
    Case(
        "a share as `mask_structure`",
        'mask_structure: 0.5 is no pattern; write "2:4", or sparsity: 0.5 for a share',
        lambda b: b.check(mask_structure=0.5),
    ),
    Case("an unknown solver", "did you mean 'sparsegpt'?", lambda b: b.check(solver="sparsegtp")),
    Case(
        "shares that do not sum to 1",
        "sum to 0.9; make them sum to 1",
        lambda b: b.check(calibration={"mixture": {"traces": 0.5, "prompts": 0.4}}),
    ),
    Case(
        "a budget larger than the problems give",
        "are used up",
        lambda b: b.prune_with(traces=b.problems({"problem": "1+1?"}, {"problem": "2+2?"})),
    ),
    Case(
        "a config group that compressed-tensors refuses",
        "config_groups.g: 1 validation error for QuantizationScheme",
        lambda b: b.prune_with(
            quantization={"config_groups": {"g": {"weights": {"num_bits": 4, "strategy": "group"}}}}
        ),
    ),
    Case(
        "a recipe without this modifier",
        f"has no {NAME} or ReasoningAwareCalibrationModifier",
        lambda b: b.rac_prune("s_stage: {m_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}"),
    ),
    Case(
        "a misspelt name of the modifier",
        f"did you mean {NAME}?",
        lambda b: b.rac_prune(
            "s_stage: {m_modifiers: {ReasoningAwareSparseGptModifier: {sparsity: 0.5}}}"
        ),
    ),
    Case(
        "a misspelt stage",
        "llm-compressor would overlook prune_stge: m_modifiers; write it as pruning_stage",
        lambda b: b.rac_prune(f"prune_stge: {{m_modifiers: {{{NAME}: {{sparsity: 0.5}}}}}}"),
    ),
    Case(
        "a modifier that llm-compressor does not have",
        "llm-compressor has no modifier 'GTPQModifier'; did you mean GPTQModifier?",
        lambda b: b.rac_prune(
            f"s_stage: {{m_modifiers: {{{NAME}: {{sparsity: 0.5}}, GTPQModifier: {{}}}}}}"
        ),
    ),
    Case(
        "both of this package's modifiers in one recipe file",
        f"has ReasoningAwareCalibrationModifier and {NAME}; leave one out",
        lambda b: b.rac_prune(
            f"s_stage: {{a_modifiers: {{{NAME}: }}, "
            "b_modifiers: {ReasoningAwareCalibrationModifier: }}"
        ),
    ),
]


@CASES.case("a model whose activations overflow", "activations of 64 of 64 inputs are not finite")
def _(b: Bench) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(b.folder)
    model.model.layers[1].input_layernorm.weight.data[:] = float("inf")
    b.prune(model, settings={"calibration": {"tokens": 300, "mixture": {"prompts": 1.0}}})


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
