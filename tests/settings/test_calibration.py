import pytest
from pydantic import ValidationError

from rac_modifier.errors import RacError
from rac_modifier.settings.calibration import CalibrationSettings, GenericText
from rac_modifier.settings.traces import TraceSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixture": {"traces": 0.5, "prompts": 0.4}}, "sum to 0.9"),
        ({"mixture": {"traces": 1.5, "prompts": -0.5}}, "prompts the share -0.5"),
        ({"mixture": {"thoughts": 1.0}}, "'thoughts'; the kinds are traces, prompts, generic"),
        ({"mixture": {"traces": float("nan")}}, "share nan"),
        ({"mixture": {}}, "sum to 0"),
        ({"prompt_weight": -1.0}, "prompt_weight is -1.0"),
        ({"trace_weight": float("inf")}, "trace_weight is inf"),
        ({"prompt_weight": 0.0, "trace_weight": 0.0}, "no token would count"),
        ({"trace_weight": 0.0}, "prompts-only baseline"),
        ({"tokens": 0}, "greater than or equal to 1"),
        ({"token": 10}, "Extra inputs"),
        ({"generic": {"sequence_tokens": 1}}, "greater than or equal to 16"),
        ({"mixture": "traces@0.7, text:c4@0.3"}, "text:c4, which is not among calibration.texts (none)"),
        ({"mixture": "traces, generic@0.5"}, "'traces' has no share; write each part as kind@share"),
        ({"mixture": "traces@much"}, "'traces@much' has no share"),
        ({"mixture": "traces:@1"}, "'traces:'; the kinds are"),
        ({"answer_weight": -1}, "answer_weight is -1"),
        ({"trace_weighting": "length"}, "'length'; use uniform, inverse_length, correct, or \"module:function\""),
        ({"trace_weighting": "os.system('x'):f"}, "use uniform"),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValidationError) as caught:
        CalibrationSettings(**values)
    assert message in str(caught.value)


def test_shares_of_zero_are_left_out_and_order_does_not_matter():
    settings = CalibrationSettings(mixture={"generic": 0.25, "prompts": 0.0, "traces": 0.75})
    assert list(settings.mixture.items()) == [("traces", 0.75), ("generic", 0.25)]


def test_a_mixture_in_one_line_is_the_same_mixture():
    texts = {"c4": {"source": "allenai/c4", "config": "en", "column": "text"}}
    line = CalibrationSettings(mixture="traces:math@0.7, traces:code@0.2 ,text:c4@0.1", texts=texts)
    spelled = CalibrationSettings(mixture={"text:c4": 0.1, "traces:math": 0.7, "traces:code": 0.2}, texts=texts)
    assert line == spelled
    assert list(line.mixture.items()) == [("traces:math", 0.7), ("traces:code", 0.2), ("generic:c4", 0.1)]
    assert CalibrationSettings(mixture="traces@1") == CalibrationSettings()
    assert CalibrationSettings(**line.model_dump()) == line


def test_names_may_hold_commas_colons_and_at_signs():
    line = "traces:reasoning-gym:gcd,chain_sum@0.25, prompts:a@b/c.jsonl@0.25, text@0.5"
    assert CalibrationSettings(mixture=line).mixture == {
        "traces:reasoning-gym:gcd,chain_sum": 0.25,
        "prompts:a@b/c.jsonl": 0.25,
        "generic": 0.5,
    }


def test_a_named_source_takes_over_what_it_does_not_set():
    settings = TraceSettings(
        store="all.jsonl",
        sampling={"max_new_tokens": 99, "samples_per_problem": 2},
        select={"finished": True},
        sources={
            "math": {"problems": {"source": "reasoning-gym:gcd"}, "select": {"pass_rate": [0.2, 0.8]}},
            "code": {"problems": {"source": "code.jsonl"}, "store": "code-traces.jsonl"},
        },
    )
    math, code, itself = settings.named("math"), settings.named("code"), settings.named("org/data")
    assert settings.named(None) is settings
    assert (math.store, math.sampling.max_new_tokens, math.select.finished) == (None, 99, False)
    assert (code.store, code.select.finished) == ("code-traces.jsonl", True)
    assert (itself.store, itself.problems.source, itself.select.finished) == (None, "org/data", True)
    with pytest.raises(RacError, match=r"traces:maths, which is not among traces\.sources \(math, code\)"):
        settings.named("maths")


def test_a_selection_that_the_sampling_cannot_meet_is_refused_early():
    with pytest.raises(ValidationError, match=r"can never be met with sampling\.max_new_tokens=50"):
        TraceSettings(sampling={"max_new_tokens": 50}, select={"min_tokens": 51})
    source = {"problems": {"source": "arithmetic"}, "select": {"pass_rate": [0, 1]}}
    with pytest.raises(ValidationError, match="samples_per_problem to 2 or more"):
        TraceSettings(sources={"math": source})


def test_prompts_may_weigh_nothing():
    assert CalibrationSettings(prompt_weight=0.0).trace_weight == 1.0


@pytest.mark.parametrize("model", [CalibrationSettings, TraceSettings, GenericText])
def test_every_setting_says_what_it_is(model):
    for name, field in model.model_fields.items():
        assert field.description or name in ("problems", "sampling"), name
