import pytest

from rac_modifier.errors import RacError
from rac_modifier.sampling.generate import render_question
from rac_modifier.settings.sampling import SamplingSettings
from tests.tiny import tiny_tokenizer


def text(ids):
    return tiny_tokenizer().decode(ids).replace(" ", "")


def test_a_system_prompt_stands_first_and_there_is_none_by_default():
    tokenizer = tiny_tokenizer("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    assert (
        text(render_question(tokenizer, "q", SamplingSettings(system_prompt="s")))
        == "[system]s[user]q"
    )
    assert text(render_question(tokenizer, "q")) == "[user]q"


def test_without_a_template_the_bare_question_is_an_option_not_a_fallback():
    tokenizer = tiny_tokenizer(chat_template=None)
    with pytest.raises(RacError, match=r"no chat template; .* bare question .*--template none"):
        render_question(tokenizer, "2+2?")
    assert text(render_question(tokenizer, "2+2?", SamplingSettings(template="none"))) == "2+2?"


def test_thinking_can_be_switched_off_where_the_template_can():
    off = SamplingSettings(thinking=False)
    assert text(render_question(tiny_tokenizer(), "2+2?", off)) == "<user>2+2?<assistant>"
    assert text(render_question(tiny_tokenizer(), "2+2?")) == "<user>2+2?<assistant><think>"


def test_a_prompt_that_cannot_be_rendered_is_refused():
    with pytest.raises(RacError, match="empty prompt"):
        render_question(tiny_tokenizer(), "", SamplingSettings(template="none"))
    picky = tiny_tokenizer(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    with pytest.raises(RacError, match=r"rejects.*no system role.*leave system_prompt out"):
        render_question(picky, "q", SamplingSettings(system_prompt="s"))


def test_a_switch_is_called_thinking_by_granite_and_deepseek():
    tokenizer = tiny_tokenizer("{{ messages[0].content }}{% if thinking %}<think>{% endif %}")
    assert text(render_question(tokenizer, "2+2?")) == "2+2?<think>"
    assert text(render_question(tokenizer, "2+2?", SamplingSettings(thinking=False))) == "2+2?"
