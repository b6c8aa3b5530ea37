import pytest

from rac_modifier.settings.prompt import PromptSettings
from rac_modifier.settings.sampling import SamplingSettings


def test_the_settings_of_a_prompt_are_those_of_sampling():
    sampling = SamplingSettings(system_prompt="Be brief.", thinking=False, max_new_tokens=5)
    assert PromptSettings.of(sampling) == PromptSettings(system_prompt="Be brief.", thinking=False)
    assert PromptSettings.of(SamplingSettings(template="none")).template == "none"


def test_the_defaults_are_those_of_sampling():
    assert PromptSettings() == PromptSettings.of(SamplingSettings())
    assert SamplingSettings(**PromptSettings().model_dump()) == SamplingSettings()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "chat template, no system prompt, thinking on"),
        (
            {"system_prompt": "X", "thinking": False},
            "chat template, system prompt 'X', thinking off",
        ),
        ({"template": "none"}, "the bare question, without a template"),
        ({"template": "none", "thinking": False}, "the bare question, without a template"),
    ],
)
def test_description(settings, words):
    assert PromptSettings(**settings).describe() == words
