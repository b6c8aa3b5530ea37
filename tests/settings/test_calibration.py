from rac_modifier.settings.calibration import CalibrationSettings, part_tokens


def test_parts_are_in_the_order_of_kinds_without_those_that_have_no_share():
    spelled = {"generic": 0.1, "traces:math": 0.7, "traces:code": 0.2, "prompts": 0.0}
    settings = CalibrationSettings(mixture=spelled)
    assert list(settings.mixture) == ["traces:math", "traces:code", "generic"]
    assert CalibrationSettings(**settings.model_dump()) == settings


def test_names_may_hold_commas_colons_and_at_signs():
    mixture = {
        "traces:reasoning-gym:gcd,chain_sum": 0.25,
        "prompts:a@b/c.jsonl": 0.25,
        "generic": 0.5,
    }
    settings = CalibrationSettings(mixture=mixture)
    assert settings.mixture == mixture
    assert settings.share("generic") == 0.5
    assert [part.name for part in settings.parts("prompts", "generic")] == ["a@b/c.jsonl", None]
    assert list(part_tokens(settings.mixture, 103).values()) == [26, 26, 51]
