import pytest
from pydantic import ValidationError

from rac_modifier.settings.entries import PruningEntry
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


def test_recovery_without_traces_is_refused():
    with pytest.raises(
        ValidationError, match=r"give traces a share of calibration.mixture, or leave recover out"
    ):
        PruningEntry(mask_structure="2:4", recover={}, calibration={"mixture": {"generic": 1.0}})
