"""Questions as token ids: chat template, generation prompt, thinking on."""

from __future__ import annotations

from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.settings.sampling import SamplingSettings, Template


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    system_prompt: str | None = None,
    template: Template = "chat",
    thinking: bool = True,
) -> list[int]:
    """Return the token ids of a question's prompt, made by the template, never decoded to text.

    "chat" applies the tokenizer's chat template, "none" tokenizes the bare question with its BOS.
    """
    if template == "none":
        ids = tokenizer(question)["input_ids"]
    else:
        ids = _apply_chat_template(tokenizer, question, system_prompt, thinking)
    if not ids:
        raise RacError(f"the question {question[:80]!r} gives an empty prompt; leave it out")
    return [int(i) for i in ids]


def _apply_chat_template(
    tokenizer: PreTrainedTokenizerBase, question: str, system_prompt: str | None, thinking: bool
) -> list[int]:
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if tokenizer.chat_template is None:
        raise RacError(
            f"tokenizer {name!r} has no chat template; give the model the bare question "
            "(traces.sampling.template: none in a recipe, --template none of rac eval)"
        )
    try:
        ids = tokenizer.apply_chat_template(
            messages_of(question, system_prompt),
            add_generation_prompt=True,
            enable_thinking=thinking,
            return_dict=False,
        )
    except TemplateError as error:
        hint = "; it may not take a system prompt: leave system_prompt out" if system_prompt else ""
        raise RacError(
            f"the chat template of tokenizer {name!r} rejects the question: {error}{hint}"
        ) from error
    return cast(list[int], ids)


def messages_of(question: str, system_prompt: str | None) -> list[dict[str, str]]:
    """Return a question as a chat."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": question}]


def render_question(
    tokenizer: PreTrainedTokenizerBase, question: str, sampling: SamplingSettings
) -> list[int]:
    """Call `render_prompt` with the prompt settings of `sampling`."""
    return render_prompt(
        tokenizer, question, sampling.system_prompt, sampling.template, sampling.thinking
    )
