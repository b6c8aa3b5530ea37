import json

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from rac_modifier.errors import RacError
from rac_modifier.evaluation.calibrated_prompt import choose_prompt, recorded_prompts
from rac_modifier.settings.sampling import PromptSettings

PLAIN = PromptSettings()
BRIEF = PromptSettings(system_prompt="Be brief.", thinking=False)
BARE = PromptSettings(template="none")


def recorded(tmp_path, content):
    (tmp_path / "rac_run.json").write_text(json.dumps(content))
    return recorded_prompts(str(tmp_path))


def test_the_prompts_of_a_run_record_by_part(tmp_path):
    assert recorded_prompts(str(tmp_path)) is None  # no run record: not compressed
    prompts = {"traces": BRIEF.model_dump(), "prompts:math": BARE.model_dump()}
    assert recorded(tmp_path, {"prompts": prompts}) == {"traces": BRIEF, "prompts:math": BARE}
    assert recorded(tmp_path, {"prompts": {}}) == {}  # calibrated on generic text
    assert recorded(tmp_path, {"method": "alps"}) == {}


def test_a_hub_id_without_a_connection_is_taken_for_a_model_without_a_record(monkeypatch):
    """Its weights may be in the cache; without the record the defaults are used."""

    def unreachable(*args, **kwargs):
        request = httpx.Request("HEAD", "http://hub")
        raise HfHubHTTPError("503", response=httpx.Response(503, request=request))

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", unreachable)
    assert recorded_prompts("org/not-here") is None


def test_the_compressed_models_decide_and_the_dense_one_follows():
    known = {"dense": None, "a": {"traces": BRIEF}, "b": {"traces": BRIEF}, "text": {}}
    line = "Prompt: chat template, system prompt 'Be brief.', thinking off."
    assert choose_prompt(known) == (BRIEF, [line])
    assert choose_prompt({"a": {"traces": BARE}})[0] == BARE
    assert choose_prompt({"dense": None, "text": {}})[0] == PLAIN


def test_an_option_replaces_what_is_recorded_field_by_field():
    known = {"dense": None, "a": {"traces": BRIEF}}
    assert choose_prompt(known, thinking=True)[0] == PromptSettings(system_prompt="Be brief.")
    assert choose_prompt(known, system_prompt="")[0] == PromptSettings(thinking=False)
    assert choose_prompt(known, template="none")[0] == BARE
    assert choose_prompt({"a": {"traces": BARE}}, template="chat")[0] == PLAIN
    assert choose_prompt(known, template="chat")[0] == BRIEF


def test_each_model_that_was_calibrated_otherwise_gets_a_line():
    known = {"dense": None, "a": {"traces": BRIEF}, "b": {"traces": PLAIN, "prompts": PLAIN}}
    _, lines = choose_prompt(known, system_prompt="Be brief.", thinking=False)
    other = "was calibrated with another prompt: chat template, no system prompt, thinking on."
    assert lines[1:] == [f"b (traces) {other}", f"b (prompts) {other}"]
    no_effect = PromptSettings(template="none", thinking=False)
    assert len(choose_prompt({"a": {"traces": no_effect}})[1]) == 1


@pytest.mark.parametrize(
    ("other", "option"),
    [
        (PromptSettings(system_prompt="X"), "--system-prompt"),
        (BARE, "--template"),
        (PromptSettings(thinking=False), "--thinking"),
    ],
)
def test_models_calibrated_with_different_prompts_need_a_choice(other, option):
    for known in ({"a": {"t": PLAIN}, "b": {"t": other}}, {"a": {"t": PLAIN, "p": other}}):
        with pytest.raises(RacError, match=f"different prompts.* choose it with {option}$"):
            choose_prompt(known)
