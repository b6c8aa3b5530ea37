import pytest
from pydantic import ValidationError

from rac_modifier.settings.calibration import (
    CalibrationBudget,
    CalibrationSettings,
    GenericText,
    name_of_weighting,
    part_tokens,
)


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
        (
            {"mixture": "traces@0.7, text:c4@0.3"},
            "text:c4, which is not among calibration.texts (none)",
        ),
        (
            {"mixture": "traces, generic@0.5"},
            "'traces' has no share; write each part as kind@share",
        ),
        ({"mixture": "traces@much"}, "'traces@much' has no share"),
        ({"mixture": "traces:@1"}, "'traces:'; the kinds are"),
        ({"answer_weight": -1}, "answer_weight is -1"),
        ({"trace_weighting": "length"}, "'length'; use uniform, inverse_length, correct"),
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
    spelled = CalibrationSettings(
        mixture={"text:c4": 0.1, "traces:math": 0.7, "traces:code": 0.2}, texts=texts
    )
    assert line == spelled
    assert list(line.mixture.items()) == [
        ("traces:math", 0.7),
        ("traces:code", 0.2),
        ("generic:c4", 0.1),
    ]
    assert CalibrationSettings(mixture="traces@1") == CalibrationSettings()
    assert CalibrationSettings(**line.model_dump()) == line


def test_names_may_hold_commas_colons_and_at_signs():
    line = "traces:reasoning-gym:gcd,chain_sum@0.25, prompts:a@b/c.jsonl@0.25, text@0.5"
    assert CalibrationSettings(mixture=line).mixture == {
        "traces:reasoning-gym:gcd,chain_sum": 0.25,
        "prompts:a@b/c.jsonl": 0.25,
        "generic": 0.5,
    }


def test_prompts_may_weigh_nothing():
    assert CalibrationSettings(prompt_weight=0.0).trace_weight == 1.0


@pytest.mark.parametrize("weighting", ["uniform", "inverse_length", "correct"])
def test_named_weightings(weighting):
    assert (
        CalibrationSettings(trace_weighting=weighting).model_dump()["trace_weighting"] == weighting
    )


@pytest.mark.parametrize(
    "text",
    ["length", "os:getcwd", "os.getcwd", "builtins:eval", "os.system('x'):f", ["uniform"], 1],
)
def test_a_weighting_is_never_looked_up_by_name(text):
    with pytest.raises(
        ValidationError, match="A function of your own can only be given from Python, as an object"
    ):
        CalibrationSettings(trace_weighting=text)


def longest_first(trace):
    return len(trace.completion_ids)


class Weigher:
    def __call__(self, trace):
        return 1.0


def test_a_function_is_recorded_by_its_qualified_name():
    settings = CalibrationSettings(trace_weighting=longest_first)
    assert settings.trace_weighting is longest_first
    assert settings.model_dump()["trace_weighting"] == f"{__name__}.longest_first"
    assert settings.model_dump(mode="json")["trace_weighting"] == f"{__name__}.longest_first"
    assert name_of_weighting(Weigher()) == f"{__name__}.Weigher"
    with pytest.raises(ValidationError, match="from Python"):
        CalibrationSettings(**settings.model_dump())  # the record of it runs no code either


def test_a_budget_without_weights_weighs_every_token_alike():
    budget = CalibrationBudget(tokens=5, mixture="prompts@1", seed=3)
    weighed = budget.weighed()
    assert type(weighed) is CalibrationSettings
    assert weighed == CalibrationSettings(tokens=5, mixture={"prompts": 1.0}, seed=3)
    assert weighed.model_fields_set == budget.model_fields_set
    assert weighed.weighed() is weighed


def test_parts_of_kinds():
    settings = CalibrationSettings(mixture="prompts:a/b@0.25, traces@0.5, text@0.25")
    assert [part.key for part in settings.parts("traces", "prompts")] == ["traces", "prompts:a/b"]
    assert settings.share("generic") == 0.25
    assert part_tokens(settings.mixture, 103) == {"traces": 52, "prompts:a/b": 26, "generic": 25}


@pytest.mark.parametrize(
    ("source", "columns", "dataset"),
    [
        ("python-docs", False, False),
        ("a.txt", False, False),
        ("a.jsonl", True, False),
        ("allenai/c4", True, True),
    ],
)
def test_kinds_of_text(source, columns, dataset):
    text = GenericText(source=source)
    assert (text.has_columns, text.is_dataset) == (columns, dataset)
