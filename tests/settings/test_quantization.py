import pytest
from pydantic import ValidationError

from rac_modifier.settings.pruning import QuantizationSettings


def group(**arguments):
    return {"config_groups": {"g": {"weights": arguments}}}


@pytest.mark.parametrize(
    "values",
    [
        {"scheme": "fp8_dynamic"},
        {"scheme": {"W8A8": ["re:.*mlp.*"], "W4A16": ["Linear"]}},
        group(num_bits=4, strategy="group", group_size=32, observer=None),
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {}, "format": None}}},
    ],
)
def test_what_is_accepted_stays_as_it_was_written(values):
    settings = QuantizationSettings(**values)
    assert settings.model_dump(exclude_unset=True) == values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "set scheme or config_groups"),
        ({"scheme": "W4"}, "scheme 'W4': no preset; use W4A16"),
        ({"scheme": {"W4A16": ["re:("]}}, "scheme.W4A16: 're:(' is no regular expression"),
        (group(num_bits=10**18), "config_groups.g.weights.num_bits is 1000000000000000000; use a"),
        (group(observer="mse"), "config_groups.g.weights.observer: 'mse' has no effect here"),
        (
            {"config_groups": {"g": {"input_activations": {"zp_dtype": "torch.int8"}}}},
            "zero points have as many bits as the codes, and symmetric schemes have none",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(values, message):
    with pytest.raises(ValidationError) as caught:
        QuantizationSettings(**values)
    assert message in str(caught.value)
