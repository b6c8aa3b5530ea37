import json

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from rac_modifier.errors import RacError
from rac_modifier.evaluation.calibrated_prompt import choose_prompt, recorded_prompts
from rac_modifier.settings.prompt import PromptSettings

PLAIN = PromptSettings()
BRIEF = PromptSettings(system_prompt="Be brief.", thinking=False)
BARE = PromptSettings(template="none")


def recorded(tmp_path, content):
    (tmp_path / "rac_run.json").write_text(json.dumps(content))
    return recorded_prompts(str(tmp_path))


def test_a_folder_without_a_run_record_is_no_compressed_model(tmp_path):
    assert recorded_prompts(str(tmp_path)) is None


def test_a_hub_id_without_a_connection_is_taken_for_a_model_without_a_record(monkeypatch):
    """Its weights may be in the cache; without the record the defaults are used."""

    def unreachable(*args, **kwargs):
        raise HfHubHTTPError(
            "503", response=httpx.Response(503, request=httpx.Request("HEAD", "http://hub"))
        )

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", unreachable)
    assert recorded_prompts("org/not-here") is None


def test_the_prompts_of_a_run_record_by_part(tmp_path):
    prompts = {"traces": BRIEF.model_dump(), "prompts:math": BARE.model_dump()}
    assert recorded(tmp_path, {"prompts": prompts}) == {"traces": BRIEF, "prompts:math": BARE}
    assert recorded(tmp_path, {"prompts": {}}) == {}  # calibrated on generic text


def test_a_record_without_prompts_is_noted(tmp_path):
    from loguru import logger

    lines = []
    sink = logger.add(lines.append, format="{message}")
    try:
        assert recorded(tmp_path, {"method": "alps"}) is None
    finally:
        logger.remove(sink)
    assert (
        "does not record the prompt settings of the calibration; the defaults are used" in lines[0]
    )


@pytest.mark.parametrize(
    "prompts",
    ["chat", ["traces"], {"traces": 3}, {"traces": {"template": "x"}}, {"traces": {"a": 1}}],
)
def test_a_damaged_record_is_an_error(tmp_path, prompts):
    with pytest.raises(RacError, match=r"rac_run\.json: its prompt settings cannot be read"):
        recorded(tmp_path, {"prompts": prompts})


def test_the_compressed_models_decide_and_the_dense_one_follows():
    choice = choose_prompt(
        {"dense": None, "a": {"traces": BRIEF}, "b": {"traces": BRIEF}, "text": {}}
    )
    assert choice.prompt == BRIEF
    assert choice.describe() == "Prompt: chat template, system prompt 'Be brief.', thinking off."
    assert choose_prompt({"a": {"traces": BARE}}).prompt == BARE


def test_defaults_where_nothing_is_recorded():
    assert choose_prompt({"dense": None, "text": {}}).prompt == PromptSettings()


def test_what_is_given_replaces_what_is_recorded_field_by_field():
    known = {"dense": None, "a": {"traces": BRIEF}}
    assert choose_prompt(known, thinking=True).prompt == PromptSettings(system_prompt="Be brief.")
    assert choose_prompt(known, system_prompt="").prompt == PromptSettings(thinking=False)
    assert choose_prompt(known, system_prompt="Think!").prompt.system_prompt == "Think!"
    assert choose_prompt(known, template="none").prompt == BARE
    assert choose_prompt({"a": {"traces": BARE}}, template="chat").prompt == PLAIN
    assert choose_prompt(known, template="chat").prompt == BRIEF


def test_each_model_that_was_calibrated_otherwise_gets_a_line():
    known = {"dense": None, "a": {"traces": BRIEF}, "b": {"traces": PLAIN, "prompts": PLAIN}}
    choice = choose_prompt(known, system_prompt="Be brief.", thinking=False)
    assert choice.differences == (
        "b (traces) was calibrated with another prompt: chat template, no system prompt, thinking on.",
        "b (prompts) was calibrated with another prompt: chat template, no system prompt, thinking on.",
    )
    assert choice.describe().count("\n") == 2


def test_a_model_with_one_part_is_named_without_it():
    (line,) = choose_prompt({"a": {"traces": BRIEF}}, template="none").differences
    assert line.startswith("a was calibrated with another prompt: ")


def test_what_has_no_effect_is_no_difference():
    assert (
        choose_prompt(
            {"a": {"traces": PromptSettings(template="none", thinking=False)}}
        ).differences
        == ()
    )


@pytest.mark.parametrize(
    ("known", "given", "option"),
    [
        (
            {"a": {"traces": PLAIN}, "b": {"traces": PromptSettings(system_prompt="X")}},
            {},
            "--system-prompt",
        ),
        (
            {"a": {"traces": PLAIN}, "b": {"traces": PromptSettings(thinking=False)}},
            {},
            "--thinking or --no-thinking",
        ),
        ({"a": {"traces": PLAIN, "prompts": BARE}}, {}, "--template"),
        ({"a": {"traces": PLAIN}, "b": {"traces": BRIEF}}, {"thinking": True}, "--system-prompt"),
    ],
)
def test_different_prompts_need_a_choice(known, given, option):
    with pytest.raises(
        RacError, match=rf"calibrated with different prompts.* choose it with {option}$"
    ) as caught:
        choose_prompt(known, **given)
    assert "a" in str(caught.value)


def test_a_system_prompt_needs_a_template():
    with pytest.raises(RacError, match="system prompt 'X' has no place without a chat template"):
        choose_prompt({"a": {"traces": BRIEF}}, template="none", system_prompt="X")


def test_thinking_needs_a_template():
    with pytest.raises(RacError, match="--no-thinking are for a chat template"):
        choose_prompt({}, template="none", thinking=False)
