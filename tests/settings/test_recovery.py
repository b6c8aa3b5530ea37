from rac_modifier.settings.recovery import RecoverySettings


def test_calibration_leaves_what_is_trained_on_and_held_out():
    assert RecoverySettings(tokens=1000, held_out_tokens=200).reserved_tokens == 1200
