"""The chat protocol: questions as text, answers as text with the server's token counts."""

from dataclasses import dataclass
from typing import Any, Self

from rac_modifier.errors import RacError
from rac_modifier.problems.answers import THINK_END
from rac_modifier.sampling.completions_api import (
    RefusedError,
    UnusableError,
    only_choice,
    sampling_fields,
    trace_seed,
)
from rac_modifier.sampling.generate import FinishReason
from rac_modifier.sampling.prompts import messages_of, thinking_switches
from rac_modifier.settings.sampling import SamplingSettings

_TEXTS = ("reasoning_content", "reasoning", "content")  # vLLM: the second
_MISCOUNT = 2  # tokens by which a server's count of a truncated answer may miss the cap


@dataclass(frozen=True)
class ChatAnswer:
    """An answer of a chat server; its thinking is a part of `text`, up to `</think>`."""

    text: str
    finish_reason: FinishReason
    tokens: int
    thinking_tokens: int
    only_thinking: bool = False  # the server returned its reasoning and no content

    @classmethod
    def read(cls, content: bytes, cap: int, server: str) -> Self:
        """Return the answer in a body with status 200.

        UnusableError for a field of a wrong type or range; RefusedError if the server hides its
        text, or truncated the answer before the cap; RacError if it does not count tokens.
        """
        choice, usage = only_choice(content)
        message, finish = choice.get("message"), choice.get("finish_reason")
        found = [message.get(n) for n in _TEXTS] if isinstance(message, dict) else [message, 0]
        texts = ["" if text is None else text for text in found]
        if not all(isinstance(text, str) for text in texts):
            raise UnusableError(f"message {str(message)[:80]!r} has no text in {', '.join(_TEXTS)}")
        thinking, reasoning, answer = map(str, texts)
        if finish not in ("stop", "length"):
            raise UnusableError(f"finish_reason {str(finish)[:60]!r} is neither stop nor length")
        tokens = usage.get("completion_tokens")
        if tokens is None:
            raise RacError(
                f"{server} counts no tokens (usage.completion_tokens is missing); name the "
                "model folder too, whose tokenizer counts them"
            )
        if type(tokens) is not int or not 0 <= tokens <= cap:
            raise UnusableError(
                f"usage.completion_tokens {str(tokens)[:60]!r} is no count of at most {cap}"
            )
        if finish == "length" and tokens < cap - _MISCOUNT:
            raise RefusedError(
                f"{server} truncated an answer at {tokens} of {cap} tokens; give it a larger "
                "context, or lower --cap"
            )
        details = usage.get("completion_tokens_details")
        counted = details.get("reasoning_tokens") if isinstance(details, dict) else None
        thinking = thinking or reasoning
        if not (thinking or answer) and tokens > 1:
            raise RefusedError(
                f"{server} returned {tokens} tokens without a text; let it return its reasoning"
            )
        # Thinking counts as closed if content follows it.
        text = thinking + THINK_END + answer if thinking and answer else thinking or answer
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written
        tokens = max(tokens, 1)
        before, tag, _ = text.partition(THINK_END)
        if not tag:
            counted = tokens
        elif type(counted) is not int or not 0 < counted <= tokens:
            counted = round(
                tokens * len(before + tag) / len(text)
            )  # without a count, by characters
        return cls(text, finish, tokens, counted, bool(thinking) and not answer)


def chat_body(question: str, key: str, sampling: SamplingSettings) -> dict[str, Any]:
    """Return the JSON of /v1/chat/completions without the model; `key` and the seed decide."""
    return {
        **sampling_fields(sampling, sampling.max_new_tokens, trace_seed(sampling.seed, key)),
        "messages": messages_of(question, sampling.system_prompt),
        "chat_template_kwargs": thinking_switches(sampling.thinking),
    }
