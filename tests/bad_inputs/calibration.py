"""Mistakes about the calibration set."""

from __future__ import annotations

from tests.bad_inputs.bench import Bench, Case, Cases

CASES = Cases()

CASES += [
    Case(
        "shares that do not sum to 1",
        "sum to 0.9; make them sum to 1",
        lambda b: b.check(calibration={"mixture": {"traces": 0.5, "prompts": 0.4}}),
    ),
    Case(
        "an unknown weighting of traces",
        "trace_weighting is 'length'; use uniform, inverse_length, correct",
        lambda b: b.check(calibration={"trace_weighting": "length"}),
    ),
    Case(
        "`traces` beside a mixture without traces and prompts",
        "traces: {'store': 's.jsonl'} has no effect with a mixture without traces and prompts; leave it out",
        lambda b: b.check(traces={"store": "s.jsonl"}, calibration={"mixture": {"generic": 1.0}}),
    ),
]


@CASES.case("a budget larger than the problems give", "are used up")
def _(b: Bench) -> None:
    b.prune_with(traces=b.problems({"problem": "1+1?"}, {"problem": "2+2?"}))
