from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from rac_modifier.settings.sampling import EngineSettings, PromptSettings, SamplingSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": float("nan")}, "finite number"),
        ({"top_p": 1.5}, "less than or equal to 1"),
        ({"temperature": 0, "samples_per_problem": 2}, "2 samples per problem at temperature 0"),
        ({"template": "none", "system_prompt": "x"}, "has no system_prompt"),
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


def test_addresses_get_their_usual_path():
    urls = ["http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000", "https://a.b/x"]
    assert EngineSettings(base_urls=urls).base_urls == ["http://127.0.0.1:8000/v1", "https://a.b/x"]


@pytest.mark.parametrize(
    ("urls", "message"),
    [
        ([], "base_urls is empty"),
        (["127.0.0.1:8000"], "is no address of a server"),
        (["http://a:b"], "is no address of a server"),
        (["http://a/v1?x=1"], "is no address of a server"),
        (["http://me:secret@a"], "name a variable with api_key_env"),
    ],
)
def test_addresses_that_cannot_be(urls, message):
    with pytest.raises(ValidationError) as caught:
        EngineSettings(base_urls=urls)
    assert message in str(caught.value)


def test_the_prompt_settings_are_among_those_of_sampling():
    sampling = SamplingSettings(system_prompt="Be brief.", thinking=False, max_new_tokens=5)
    prompt = PromptSettings.of(sampling)
    assert prompt == PromptSettings(system_prompt="Be brief.", thinking=False)
    assert prompt.describe() == "chat template, system prompt 'Be brief.', thinking off"
    assert PromptSettings().describe() == "chat template, no system prompt, thinking on"
    bare = PromptSettings(template="none", thinking=False)
    assert bare.describe() == PromptSettings(template="none").describe()
