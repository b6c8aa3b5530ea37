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
        "an unknown kind in the mixture",
        "mixture names 'thoughts'; the kinds are traces, prompts, generic",
        lambda b: b.check(calibration={"mixture": {"thoughts": 1.0}}),
    ),
    Case(
        "a part of a mixture in one line without its share",
        "mixture: 'traces:math' has no share; write each part as kind@share or kind:name@share",
        lambda b: b.check(calibration={"mixture": "traces:math, text:python-docs@0.1"}),
    ),
    Case(
        "a mixture that names traces declared nowhere",
        "mixture names traces:maths, which is not among traces.sources (math)",
        lambda b: b.check(
            traces={"sources": {"math": {"problems": {"source": "arithmetic"}}}},
            calibration={"mixture": "traces:maths@1"},
        ),
    ),
    Case(
        "a mixture that names text declared nowhere",
        "mixture names text:c4, which is not among calibration.texts (none)",
        lambda b: b.check(calibration={"mixture": "traces@0.9, text:c4@0.1"}),
    ),
    Case(
        "an unknown weighting of traces",
        "trace_weighting is 'length'; use uniform, inverse_length, correct",
        lambda b: b.check(calibration={"trace_weighting": "length"}),
    ),
    Case(
        "a function as text, which a recipe cannot name",
        "trace_weighting is 'os:getcwd'; use uniform, inverse_length, correct. A function of your own can only be given from "
        "Python, as an object",
        lambda b: b.check(calibration={"trace_weighting": "os:getcwd"}),
    ),
    Case(
        "a weight of tokens in a mixture where all weigh the same",
        "calibration.prompt_weight: 0.5 has no effect beside a mixture whose tokens all weigh the same; leave it out",
        lambda b: b.check(calibration={"mixture": {"prompts": 1.0}, "prompt_weight": 0.5}),
    ),
    Case(
        "`traces` beside a mixture without traces and prompts",
        "traces: {'store': 's.jsonl'} has no effect beside a mixture without traces and prompts; leave it out",
        lambda b: b.check(traces={"store": "s.jsonl"}, calibration={"mixture": {"generic": 1.0}}),
    ),
    Case(
        "how traces are sampled, beside a mixture of prompts alone",
        "traces.sampling.max_new_tokens: 512 has no effect beside a mixture without traces",
        lambda b: b.check(
            traces={"sampling": {"max_new_tokens": 512}}, calibration={"mixture": {"prompts": 1.0}}
        ),
    ),
    Case(
        "generic text without its column",
        "needs the name of its text column",
        lambda b: b.prune_with(
            calibration={
                "mixture": {"generic": 1.0},
                "generic": {"source": "some/dataset"},
                "tokens": 300,
            }
        ),
    ),
]


@CASES.case("too little generic text", "the generic part of the calibration set has")
def _(b: Bench) -> None:
    text = b.tmp / "text.txt"
    text.write_text("ordinary text. " * 100)
    b.prune_with(
        calibration={
            "mixture": {"generic": 1.0},
            "tokens": 20_000,
            "generic": {"source": str(text)},
        }
    )


@CASES.case("a budget larger than the problems give", "are used up")
def _(b: Bench) -> None:
    b.prune_with(traces=b.problems({"problem": "1+1?"}, {"problem": "2+2?"}))


@CASES.case("traces cut to their prompts by `max_sequence_tokens`", "no token of any")
def _(b: Bench) -> None:
    rows = [{"problem": f"{i} what is " + "1 + " * 30 + "1?"} for i in range(20)]
    b.prune_with(traces=b.problems(*rows), calibration={"tokens": 150, "max_sequence_tokens": 16})
