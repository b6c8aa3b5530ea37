"""The completions protocol: what is asked, and what an answer must be to count as a trace. No network here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from rac_modifier.errors import RacError
from rac_modifier.sampling.generate import Generation
from rac_modifier.settings.sampling import SamplingSettings


class UnusableError(Exception):
    """An answer that may come out right when it is asked for again, after `seconds` if the server says so."""

    def __init__(self, message: str, seconds: float | None = None):
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class Ask:
    """One request: the model's served name, the prompt, and how to continue it."""

    model: str
    prompt_ids: list[int]
    max_tokens: int
    seed: int
    eos: tuple[int, ...]

    def body(self, sampling: SamplingSettings) -> dict[str, Any]:
        """The JSON body of POST /v1/completions; `sampling` must be resolved.

        Everything that a server would else fill from the model's generation_config is named: only temperature, top_k and
        top_p shape the distribution, as in this process.
        """
        return {
            "model": self.model,
            "prompt": self.prompt_ids,
            "max_tokens": self.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": self.seed,
            "stop_token_ids": list(self.eos),
            "stream": False,
            "n": 1,
            "return_token_ids": True,
        }


def trace_seed(seed: int, key: str) -> int:
    """The seed of one trace, 31 bits since not every server takes more: a function of (seed, key) alone."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**31


def read_answer(ask: Ask, content: bytes, vocab_size: int, server: str) -> Generation:
    """The completion in the body of an answer with status 200.

    Raises:
        UnusableError: cut short, or it contradicts itself.
        RacError: the server does not return token ids, changed the prompt, or ends completions without their EOS: asking
            again would not help.
    """
    choice, usage = _only_choice(content)
    ids = choice.get("token_ids")
    if ids is None:
        raise RacError(
            f"{server} returned text without token ids, and traces are never tokenized again from text: it must "
            "support `return_token_ids` in /v1/completions (vllm serve does)"
        )
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise UnusableError(f"token_ids {str(ids)[:60]} are not ids of the model's vocabulary of {vocab_size}")
    read = choice.get("prompt_token_ids")
    if read is not None and read != ask.prompt_ids:
        raise RacError(
            f"{server} read another prompt than it was sent ({len(read)} tokens, not {len(ask.prompt_ids)}): switch off "
            "what cuts or extends prompts there"
        )
    counted = usage.get("completion_tokens", len(ids))
    if counted != len(ids) or len(ids) > ask.max_tokens:
        raise UnusableError(f"{len(ids)} token ids, {counted} counted, {ask.max_tokens} asked for at most")
    return _finished(ask, tuple(ids), choice.get("finish_reason"), server)


def error_text(content: bytes) -> str:
    """What the body of an answer with an error status says, in one line."""
    text = content.decode("utf-8", "replace")
    try:
        data = json.loads(text)
        error = data.get("error", data)
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300] or "no reason given"


def _only_choice(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        data = json.loads(content)
        (choice,) = data["choices"]
        usage = data.get("usage") or {}
        if isinstance(choice, dict) and isinstance(usage, dict):
            return choice, usage
    except (ValueError, KeyError, TypeError) as error:
        raise UnusableError(f"no completion in the answer ({type(error).__name__}: {str(error)[:80]})") from error
    raise UnusableError("no completion in the answer")


def _finished(ask: Ask, ids: tuple[int, ...], reason: Any, server: str) -> Generation:
    eos = set(ask.eos)
    if reason == "stop" and ids[-1] not in eos:
        raise RacError(
            f"{server} ended a completion on token {ids[-1]}, which is no EOS ({', '.join(map(str, ask.eos))}): it strips "
            "the EOS or has stop words of its own; traces need the EOS that the model wrote"
        )
    if eos.intersection(ids[:-1]):
        raise RacError(f"{server} wrote on behind an EOS; switch off `ignore_eos` there")
    if reason == "length" and len(ids) == ask.max_tokens:
        # An EOS as the very last token that fits: servers report either reason.
        return Generation(ids, "stop" if ids[-1] in eos else "length")
    if reason == "stop":
        return Generation(ids, "stop")
    raise UnusableError(f"finish_reason {reason!r} after {len(ids)} of {ask.max_tokens} tokens")
