"""Mistakes in a recipe."""

from __future__ import annotations

from tests.bad_inputs.bench import Bench, Case, Cases
from tests.tiny import NAME

CASES = Cases()

CASES += [
    Case(
        "a recipe that is not there",
        "no recipe at",
        lambda b: b.rac("prune", b.folder, b.tmp / "o", "-r", "no.yaml"),
    ),
    Case(
        "a misspelt name of a shipped recipe",
        "did you mean rac_2of4",
        lambda b: b.rac("prune", b.folder, b.tmp / "o", "-r", "rac_2of5"),
    ),
    Case("a recipe that is not YAML", "is not YAML", lambda b: b.rac_prune("pruning_stage: [")),
    Case(
        "a setting that does not exist",
        "calibration.token: there is no such setting (value 5)",
        lambda b: b.check(calibration={"token": 5}),
    ),
    Case(
        "a setting in another group",
        "tokens: there is no such setting (value 5); did you mean calibration.tokens or recover.tokens?",
        lambda b: b.check(tokens=5),
    ),
    Case(
        "a misspelt setting",
        "traces.sample: there is no such setting (value {'seed': 1}); did you mean traces.sampling?",
        lambda b: b.check(traces={"sample": {"seed": 1}}),
    ),
    Case(
        "a setting like no other",
        "calibration.gpu: there is no such setting (value 1); use calibration.tokens, calibration.mixture",
        lambda b: b.check(calibration={"gpu": 1}),
    ),
    Case(
        "an empty recipe",
        "recipe.yaml is empty; write it as pruning_stage:",
        lambda b: b.rac_prune(""),
    ),
    Case(
        "a recipe without this modifier",
        f"has no {NAME} or ReasoningAwareCalibrationModifier",
        lambda b: b.rac_prune("s_stage: {m_modifiers: {SparseGPTModifier: {sparsity: 0.5}}}"),
    ),
    Case(
        "a misspelt name of the modifier",
        f"ReasoningAwareSparseGptModifier is no modifier; did you mean {NAME}?",
        lambda b: b.rac_prune(
            "s_stage: {m_modifiers: {ReasoningAwareSparseGptModifier: {sparsity: 0.5}}}"
        ),
    ),
    Case(
        "a stage without its suffix, which llm-compressor overlooks",
        "llm-compressor would overlook pruning: pruning_modifiers",
        lambda b: b.rac_prune(f"pruning: {{pruning_modifiers: {{{NAME}: {{sparsity: 0.5}}}}}}"),
    ),
    Case(
        "`--set` without a value",
        "is not key=value",
        lambda b: b.rac_prune(None, "o", None, "-s", "sparsity"),
    ),
    Case(
        '`oneshot(pipeline="basic")`',
        'pipeline="basic" does not prune layer by layer',
        lambda b: b.prune(pipeline="basic"),
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
    Case(
        "`order: layer` beside a dense target",
        "order: layer has no dense activations to aim at; set reconstruct: pruned, or order: auto",
        lambda b: b.check(order="layer"),
    ),
]


@CASES.case(
    "`order: group` where the model cannot be traced",
    "order: group is not possible here: tracing failed",
)
def _(b: Bench) -> None:
    from rac_modifier.llmcompressor import pipeline
    from rac_modifier.llmcompressor.stages import UntraceableError

    def fails(*args: object) -> None:
        raise UntraceableError("tracing failed: a loop over experts")

    b.monkeypatch.setattr(pipeline, "trace_stages", fails)
    b.prune_with(order="group")


@CASES.case(
    "`experts: all` for a model without experts",
    "experts: 'all' has no effect here: no routed expert",
)
def _(b: Bench) -> None:
    b.prune_with(experts="all")
