"""Questions as token ids: chat template, generation prompt, thinking on."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.settings.sampling import SamplingSettings


def render_question(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    sampling: SamplingSettings = SamplingSettings(),  # noqa: B008 - frozen
) -> list[int]:
    """Return the token ids of a question's prompt, made by the template, never decoded to text.

    "chat" applies the tokenizer's chat template, "none" tokenizes the bare question with its BOS.
    """
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if sampling.template == "none":
        ids = tokenizer(question)["input_ids"]
    elif tokenizer.chat_template is None:
        raise RacError(
            f"tokenizer {name!r} has no chat template; give the model the bare question "
            "(traces.sampling.template: none in a recipe, --template none of rac eval)"
        )
    else:
        try:
            ids = tokenizer.apply_chat_template(
                messages_of(question, sampling.system_prompt),
                add_generation_prompt=True,
                return_dict=False,
                **thinking_switches(sampling.thinking),
            )
        except TemplateError as error:
            hint = "it may not take a system prompt: leave system_prompt out"
            hint = f"; {hint}" if sampling.system_prompt else ""
            raise RacError(
                f"the chat template of tokenizer {name!r} rejects the question: {error}{hint}"
            ) from error
    if not ids:
        raise RacError(f"the question {question[:80]!r} gives an empty prompt; leave it out")
    return [int(i) for i in ids]


def thinking_switches(on: bool) -> dict[str, Any]:
    """Return the switches of chat templates: Qwen's name, then Granite's and DeepSeek's."""
    return {"enable_thinking": on, "thinking": on}


def messages_of(question: str, system_prompt: str | None) -> list[dict[str, str]]:
    """Return a question as a chat."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": question}]
