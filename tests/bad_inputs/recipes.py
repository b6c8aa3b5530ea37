"""Mistakes in a recipe: pattern, targets, calibration, quantization, modifiers."""

import yaml

from tests.bad_inputs.bench import Bench, Case, Cases
from tests.tiny import NAME

CASES = Cases()
NO_SIZE = {"num_bits": 4, "strategy": "group"}

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
        "a budget larger than the problems give",
        "are used up",
        lambda b: b.prune_with(traces=b.problems({"problem": "1+1?"}, {"problem": "2+2?"})),
    ),
    Case(
        "a config group that compressed-tensors refuses",
        "config_groups.g: no scheme (1 validation error for QuantizationScheme",
        lambda b: b.prune_with(quantization={"config_groups": {"g": {"weights": NO_SIZE}}}),
    ),
    Case(
        "a recipe without this modifier",
        f"has no {NAME} or ReasoningAwareCalibrationModifier",
        lambda b: b.rac_prune("s_stage: {m_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}"),
    ),
    Case(
        "a misspelt name of the modifier",
        f"did you mean {NAME}?",
        lambda b: b.rac_prune(f"s_stage: {{m_modifiers: {{{NAME.lower()}: {{sparsity: 0.5}}}}}}"),
    ),
]


@CASES.case("an asymmetric modifier after pruning, packed", "quantize with a symmetric scheme")
def _(b: Bench) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = {**NO_SIZE, "group_size": 32, "symmetric": False}
    groups = {"g": {"targets": ["Linear"], "weights": weights}}
    later = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
    b.prune(later=(later,), output_dir=str(b.tmp / "out"))
