from types import SimpleNamespace

import pytest

from rac_modifier.settings.sampling import EngineSettings, PromptSettings, SamplingSettings


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (None, (0.6, 0.95, 0)),
        (SimpleNamespace(do_sample=False, temperature=0.1, top_p=0.2, top_k=3), (0.6, 0.95, 0)),
        (SimpleNamespace(do_sample=True, temperature=0.1, top_p=None, top_k=3), (0.1, 0.95, 3)),
    ],
)
def test_what_is_left_open_is_the_models_or_usual(own, expected):
    resolved = SamplingSettings().resolved(own)
    assert (resolved.temperature, resolved.top_p, resolved.top_k) == expected


def test_addresses_get_their_usual_path():
    urls = ["http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000", "https://a.b/x"]
    assert EngineSettings(base_urls=urls).base_urls == ["http://127.0.0.1:8000/v1", "https://a.b/x"]


def test_the_prompt_settings_are_among_those_of_sampling():
    sampling = SamplingSettings(system_prompt="Be brief.", thinking=False, max_new_tokens=5)
    prompt = PromptSettings.of(sampling)
    assert prompt == PromptSettings(system_prompt="Be brief.", thinking=False)
    assert prompt.describe() == "chat template, system prompt 'Be brief.', thinking off"
    assert PromptSettings().describe() == "chat template, no system prompt, thinking on"
    bare = PromptSettings(template="none", thinking=False)
    assert bare.describe() == PromptSettings(template="none").describe()
