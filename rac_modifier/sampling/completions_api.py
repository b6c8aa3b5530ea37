"""The completions protocol: the request, and the checks that an answer must pass to become a trace. No network here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.sampling.generate import Generation
from rac_modifier.settings.sampling import SamplingSettings


class UnusableError(Exception):
    """An answer that fails a check, where asking again may help."""


@dataclass(frozen=True)
class Request:
    """One completion to ask for."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    eos: tuple[int, ...]

    def body(self, model: str, sampling: SamplingSettings) -> dict[str, Any]:
        """What is sent to /v1/completions, before it is JSON; `sampling` must be resolved.

        Every setting that a server would otherwise take from the model's generation_config is named: only temperature, top_k
        and top_p shape the distribution, as in this process.
        """
        return {
            "model": model,
            "prompt": list(self.prompt_ids),
            "max_tokens": self.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": self.seed,
            "stream": False,
            "n": 1,
            # What vLLM takes beside OpenAI's own settings:
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(self.eos),
            "return_token_ids": True,
        }


def trace_seed(seed: int, key: str) -> int:
    """The seed of one trace, a function of (seed, key) alone; 31 bits, since some servers take no larger ones."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**31


def read_answer(
    request: Request,
    content: bytes,
    vocab_size: int,
    server: str,
    tokenize: Callable[[str], Sequence[int]] | None = None,
) -> Generation:
    """The completion in the body of an answer with status 200.

    `tokenize` is called with the text of an answer without token ids, and its EOS is added; None: such an answer is refused.

    Raises:
        UnusableError: the answer is cut short or contradicts itself.
        RacError: the server does not return token ids, changed the prompt, or ends completions without their EOS. Asking
            again would not help.
    """
    choice, usage = _only_choice(content)
    ids = choice.get("token_ids")
    if ids is None and tokenize is not None:
        return _from_text(request, choice, tokenize)
    if ids is None:
        raise RacError(
            f"{server} returned text without token ids, and traces are never tokenized again from text: it must "
            "support `return_token_ids` in /v1/completions (vllm serve does)"
        )
    if (
        not isinstance(ids, list)
        or not ids
        or not all(type(i) is int and 0 <= i < vocab_size for i in ids)
    ):
        raise UnusableError(
            f"token_ids {str(ids)[:60]} are not ids of the model's vocabulary of {vocab_size}"
        )
    read = choice.get("prompt_token_ids")
    if read is not None and read != list(request.prompt_ids):
        raise RacError(
            f"{server} read another prompt than it was sent ({len(read)} tokens, not {len(request.prompt_ids)}): switch off "
            "whatever cuts or extends prompts there"
        )
    counted = usage.get("completion_tokens", len(ids))
    if counted != len(ids) or len(ids) > request.max_tokens:
        raise UnusableError(
            f"{len(ids)} token ids, {counted} counted, at most {request.max_tokens} asked for"
        )
    return _finished(request, tuple(ids), choice.get("finish_reason"), server)


def error_text(content: bytes) -> str:
    """Return the message in the body of an error, in one line."""
    message: Any = content.decode("utf-8", "replace")
    try:
        message = json.loads(content)
        for name in ("error", "message"):
            message = message.get(name, message) if isinstance(message, dict) else message
    except (ValueError, RecursionError):  # no JSON: the text as it is
        pass
    return " ".join(str(message or "no reason given").split())[:300]


def _only_choice(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        data = json.loads(content)
        (choice,) = data["choices"]
        usage = data.get("usage") or {}
        if isinstance(choice, dict) and isinstance(usage, dict):
            return choice, usage
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UnusableError(
            f"no completion in the answer ({type(error).__name__}: {str(error)[:80]})"
        ) from error
    raise UnusableError("no completion in the answer")


def _from_text(
    request: Request, choice: dict[str, Any], tokenize: Callable[[str], Sequence[int]]
) -> Generation:
    text, reason = choice.get("text"), choice.get("finish_reason")
    if (
        not isinstance(text, str)
        or reason not in ("stop", "length")
        or (reason == "length" and not text)
    ):
        raise UnusableError(f"finish_reason {reason!r} of the text {str(text)[:60]!r}")
    ids = tuple(tokenize(text))
    return Generation((*ids, request.eos[0]) if reason == "stop" else ids, reason)


def _finished(request: Request, ids: tuple[int, ...], reason: Any, server: str) -> Generation:
    eos = set(request.eos)
    if reason == "stop" and ids[-1] not in eos:
        raise RacError(
            f"{server} ended a completion on token {ids[-1]}, which is no EOS ({', '.join(map(str, request.eos))}): it "
            "strips the EOS or has stop words of its own; traces need the EOS that the model wrote"
        )
    if eos.intersection(ids[:-1]):
        raise RacError(
            f"{server} continued a completion after an EOS; switch off `ignore_eos` there"
        )
    if reason == "length" and len(ids) == request.max_tokens:
        # Where the EOS is the last token that fits, servers report either reason.
        return Generation(ids, "stop" if ids[-1] in eos else "length")
    if reason == "stop":
        return Generation(ids, "stop")
    raise UnusableError(f"finish_reason {reason!r} after {len(ids)} of {request.max_tokens} tokens")
