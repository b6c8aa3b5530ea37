"""Mistakes about the calibration set."""

from __future__ import annotations

from bad_inputs.bench import Bench, Case, Cases

CASES = Cases()

CASES += [
    Case(
        "shares that do not sum to 1",
        "sum to 0.9; make them sum to 1",
        lambda b: b.check(calibration={"mixture": {"traces": 0.5, "prompts": 0.4}}),
    ),
    Case(
        "an unknown kind in the mixture",
        "mixture names 'thoughts'; the kinds are traces, prompts, generic",
        lambda b: b.check(calibration={"mixture": {"thoughts": 1.0}}),
    ),
    Case(
        "a negative token weight",
        "prompt_weight is -1.0; use a finite number of at least 0",
        lambda b: b.check(calibration={"prompt_weight": -1}),
    ),
    Case(
        "`trace_weight: 0` with traces in the mixture",
        "no chain-of-thought token would reach the Hessian",
        lambda b: b.check(calibration={"trace_weight": 0}),
    ),
    Case(
        "generic text without its column",
        "needs the name of its text column",
        lambda b: b.prune_with(
            calibration={"mixture": {"generic": 1.0}, "generic": {"source": "some/dataset"}, "tokens": 300}
        ),
    ),
    Case(
        "too little generic text",
        "the generic part of the calibration set has",
        lambda b: b.prune_with(calibration={"mixture": {"generic": 1.0}, "tokens": 10**9}),
    ),
]


@CASES.case("a budget larger than the problems give", "are used up")
def _(b: Bench) -> None:
    b.prune_with(traces=b.problems({"problem": "1+1?"}, {"problem": "2+2?"}))


@CASES.case("traces cut to their prompts by `max_sequence_tokens`", "no token of any")
def _(b: Bench) -> None:
    rows = [{"problem": f"{i} what is " + "1 + " * 30 + "1?"} for i in range(20)]
    b.prune_with(traces=b.problems(*rows), calibration={"tokens": 150, "max_sequence_tokens": 16})
