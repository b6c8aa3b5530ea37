from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from rac_modifier.settings.sampling import EngineSettings, PromptSettings, SamplingSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1}, "greater than or equal to 0"),
        ({"temperature": float("nan")}, "finite number"),
        ({"top_p": 0}, "greater than 0"),
        ({"top_p": 1.5}, "less than or equal to 1"),
        ({"max_new_tokens": 0}, "greater than or equal to 1"),
        ({"temperature": 0, "samples_per_problem": 2}, "samples_per_problem=2 at temperature 0"),
        ({"template": "none", "system_prompt": "x"}, "has no place for a system_prompt"),
        ({"template": "jinja"}, "'chat' or 'none'"),
        ({"batch": 4}, "Extra inputs"),
    ],
)
def test_what_cannot_be_sampled_is_refused(values, message):
    with pytest.raises(ValidationError) as caught:
        SamplingSettings(**values)
    assert message in str(caught.value)


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


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        (["http://127.0.0.1:8000"], ["http://127.0.0.1:8000/v1"]),
        (
            ["http://127.0.0.1:8000/v1/", "https://a.b/x"],
            ["http://127.0.0.1:8000/v1", "https://a.b/x"],
        ),
    ],
)
def test_addresses_get_their_usual_path(urls, expected):
    assert EngineSettings(base_urls=urls).base_urls == expected


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "base_urls is empty"),
        (["127.0.0.1:8000"], "is no address of a server"),
        (["http://a:0"], "is no address of a server"),
        (["http://a:b"], "is no address of a server"),
        (["http://a/v1?x=1"], "is no address of a server"),
        (["http://me:secret@a"], "name a variable with api_key_env"),
        (["http://a", "http://a/v1"], "names a server twice"),
    ],
)
def test_addresses_that_cannot_be(urls, message):
    with pytest.raises(ValidationError) as caught:
        EngineSettings(base_urls=urls)
    assert message in str(caught.value)


def test_the_prompt_settings_are_among_those_of_sampling():
    sampling = SamplingSettings(system_prompt="Be brief.", thinking=False, max_new_tokens=5)
    assert PromptSettings.of(sampling) == PromptSettings(system_prompt="Be brief.", thinking=False)
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
        ({"template": "none", "thinking": False}, "the bare question, without a template"),
    ],
)
def test_prompts_are_described_alike_if_they_are(settings, words):
    assert PromptSettings(**settings).describe() == words
