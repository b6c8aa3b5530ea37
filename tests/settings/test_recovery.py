import pytest
from pydantic import ValidationError

from rac_modifier.settings.recovery import RecoverySettings


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": 0},
        {"passes": 17},
        {"learning_rate": 0},
        {"learning_rate": float("inf")},
        {"step_tokens": 1},
        {"steps": 3},
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValidationError):
        RecoverySettings(**wrong)
