import pytest
from pydantic import ValidationError

from rac_modifier.settings.recovery import RecoverySettings


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": 0}, {"passes": 17}, {"learning_rate": float("inf")}, {"step_tokens": 1}],
    ids=str,
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValidationError):
        RecoverySettings(**wrong)


def test_calibration_leaves_what_is_trained_on_and_held_out():
    settings = RecoverySettings(tokens=1000, held_out_tokens=200, generic_share=0.25)
    assert (settings.reserved_tokens, settings.generic_tokens) == (950, 250)
