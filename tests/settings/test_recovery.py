from rac_modifier.settings.recovery import RecoverySettings


def test_calibration_leaves_what_is_trained_on_and_held_out():
    settings = RecoverySettings(tokens=1000, held_out_tokens=200, generic_share=0.25)
    assert (settings.reserved_tokens, settings.generic_tokens) == (950, 250)
