"""Mistakes in a recipe."""

from __future__ import annotations

from tests.bad_inputs.bench import Case, Cases
from tests.tiny import NAME

CASES = Cases()

CASES += [
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
]


CASES += [
    Case(
        "both of this package's modifiers in one recipe file",
        f"has ReasoningAwareCalibrationModifier and {NAME}; leave one of them out",
        lambda b: b.rac_prune(
            f"s_stage: {{a_modifiers: {{{NAME}: }}, b_modifiers: {{ReasoningAwareCalibrationModifier: }}}}"
        ),
    ),
    Case(
        "a preset that does not exist",
        "preset: must be 'quality', 'fast' or 'paper'",
        lambda b: b.check(preset="best"),
    ),
]
