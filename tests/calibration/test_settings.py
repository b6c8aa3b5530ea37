import pytest
from pydantic import ValidationError

from rac_modifier.calibration.settings import CalibrationSettings, GenericText, TraceSettings


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
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValidationError) as caught:
        CalibrationSettings(**values)
    assert message in str(caught.value)


def test_shares_of_zero_are_left_out_and_order_does_not_matter():
    settings = CalibrationSettings(mixture={"generic": 0.25, "prompts": 0.0, "traces": 0.75})
    assert list(settings.mixture.items()) == [("traces", 0.75), ("generic", 0.25)]


def test_prompts_may_weigh_nothing():
    assert CalibrationSettings(prompt_weight=0.0).trace_weight == 1.0


@pytest.mark.parametrize("model", [CalibrationSettings, TraceSettings, GenericText])
def test_every_setting_says_what_it_is(model):
    for name, field in model.model_fields.items():
        assert field.description or name in ("problems", "sampling"), name
