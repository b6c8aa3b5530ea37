"""The completions protocol without network: requests, and checks of the answers."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePath
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from rac_modifier.errors import RacError
from rac_modifier.runtime.files import public_name
from rac_modifier.runtime.models import evaluating
from rac_modifier.sampling.engine import Probe
from rac_modifier.sampling.generate import Generation
from rac_modifier.settings.sampling import SamplingSettings

# Short, so that a check costs seconds; four, so that a chance agreement does not pass.
PROBE_QUESTIONS = (
    "What is 17 + 25?",
    "Compute 6 * 7.",
    "Name a prime number above 20.",
    "Is 91 prime? Explain.",
)
PROBE_TOKENS = 24
PROBE_SAMPLING = SamplingSettings(temperature=0, top_p=1, top_k=0, max_new_tokens=PROBE_TOKENS)
# Nats by which a token may be less likely than the model's own choice. The maximum over 96 tokens
# of the embedded reasoner is 0.5 if served in int4 (round to nearest), and 4.9 if half pruned.
_REGRET = 1.0
_LONGEST_SHOWN, _MOST_SHOWN = 300, 10  # characters of a text, names of a list in a message


class UnusableError(Exception):
    """No answer, or one that fails a check; asking again may help."""


class UnavailableError(UnusableError):
    """The server is away or overloaded; the prompt is not the reason. `pause`: Retry-After, s."""

    def __init__(self, message: str, pause: float = 0.0):
        super().__init__(message)
        self.pause = pause


class RefusedError(Exception):
    """A server will not complete this prompt, however often it is asked."""


@dataclass(frozen=True)
class Request:
    """A completion to ask for."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    seed: int
    eos: tuple[int, ...]

    def body(self, sampling: SamplingSettings) -> dict[str, Any]:
        """Return the JSON of /v1/completions without the model."""
        return {
            **sampling_fields(sampling, self.max_tokens, self.seed),
            "prompt": list(self.prompt_ids),
            "stop_token_ids": list(self.eos),  # vLLM's, and the next one too
            "return_token_ids": True,
        }

    def read(self, content: bytes, vocab_size: int, server: str) -> Generation:
        """Return the completion in the body of an answer with status 200.

        UnusableError if it is truncated or contradicts itself; RacError for no token ids, another
        prompt, or no EOS: asking again would not help.
        """
        choice, usage = only_choice(content)
        ids, reason, eos = choice.get("token_ids"), choice.get("finish_reason"), set(self.eos)
        if ids is None:
            raise RacError(
                f"{server} returned text without token ids: it must have `return_token_ids`, as "
                "vllm serve; rac eval without the model folder reads text"
            )
        if not (
            isinstance(ids, list)
            and ids
            and all(type(i) is int and 0 <= i < vocab_size for i in ids)
        ):
            raise UnusableError(
                f"token_ids {str(ids)[:60]} are not ids of the model's vocabulary of {vocab_size}"
            )
        prompt = choice.get("prompt_token_ids")
        if prompt is not None and not isinstance(prompt, list):
            raise UnusableError(f"prompt_token_ids {str(prompt)[:60]} are no list")
        if prompt is not None and prompt != list(self.prompt_ids):
            raise RacError(
                f"{server} read another prompt than it was sent ({len(prompt)} tokens, not "
                f"{len(self.prompt_ids)}): switch off whatever cuts or extends prompts there"
            )
        counted = usage.get("completion_tokens", len(ids))
        if counted != len(ids) or len(ids) > self.max_tokens:
            raise UnusableError(
                f"{len(ids)} token ids, {counted} counted, at most {self.max_tokens} asked for"
            )
        if reason == "stop" and ids[-1] not in eos:
            raise RacError(
                f"{server} ended a completion on token {ids[-1]}, which is no EOS "
                f"({', '.join(map(str, self.eos))}): let it return the EOS, and use no stop words"
            )
        if eos.intersection(ids[:-1]):
            raise RacError(
                f"{server} continued a completion after an EOS; switch off `ignore_eos` there"
            )
        if reason != "stop" and (reason != "length" or len(ids) < self.max_tokens):
            raise UnusableError(
                f"finish_reason {reason!r} after {len(ids)} of {self.max_tokens} tokens"
            )
        # Servers report either reason for an EOS that is the last token that fits.
        return Generation(tuple(ids), "stop" if ids[-1] in eos else "length")


def sampling_fields(sampling: SamplingSettings, max_tokens: int, seed: int) -> dict[str, Any]:
    """Return every setting that a server would take from the model's generation_config."""
    return {
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stream": False,
        "n": 1,
        # vLLM's additions to OpenAI's settings:
        "top_k": sampling.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


def trace_seed(seed: int, key: str) -> int:
    """Return the seed of one trace, a function of (seed, key); 31 bits, which all servers take."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**31


def error_text(content: bytes) -> str:
    """Return the message in the body of an error, in one line."""
    message: Any = content.decode("utf-8", "replace")
    try:
        message = json.loads(content)
        for name in ("error", "message"):
            message = message.get(name, message) if isinstance(message, dict) else message
    except (ValueError, RecursionError):  # no JSON: the text as it is
        pass
    return shown(" ".join(str(message or "no reason given").split())[:300])


def shown(text: str) -> str:
    """Return a text of a server or a file for a message: at most 300 printable characters."""
    text = text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def only_choice(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the choice and the usage of an answer (UnusableError: not one choice)."""
    try:
        data = json.loads(content)
        (choice,) = data["choices"]
        usage = data.get("usage") or {}
        if not isinstance(choice, dict) or not isinstance(usage, dict):
            raise TypeError("no object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        if b'"choices"' not in content:  # an error with status 200
            reason = error_text(content)
        raise UnusableError(f"no completion in the answer ({reason})") from error
    return choice, usage


@dataclass(frozen=True)
class ServedModel:
    """The entry of a server's GET /v1/models to sample from."""

    server: str
    card: dict[str, Any]

    @classmethod
    def of(cls, content: bytes, named: str | None, server: str) -> Self:
        """Return the entry of GET /v1/models to sample from: `named`, or the only base model."""
        try:
            cards = {str(card["id"]): dict(card) for card in json.loads(content)["data"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RacError(
                f"{server}/models is not a list of models; is this an OpenAI-compatible server?"
            ) from error
        for name in cards:
            if len(name) > _LONGEST_SHOWN or shown(name) != name:
                raise RacError(
                    f"{server} has a model with a name that cannot be used: {shown(name)!r}"
                )
        names = ", ".join(map(repr, islice(cards, _MOST_SHOWN))) or "none"
        names += f" and {len(cards) - _MOST_SHOWN:,} others" * (len(cards) > _MOST_SHOWN)
        bases = [name for name, card in cards.items() if not card.get("parent")]
        if (named is None and len(bases) != 1) or (named is not None and named not in cards):
            serves = (
                f"serves {names}" if named is None else f"does not serve {named!r}, but {names}"
            )
            raise RacError(f"{server} {serves}; set engine.model (rac eval: --served-as)")
        card = cards[bases[0] if named is None else named]
        if card.get("parent"):
            raise RacError(
                f"{server}: {card['id']!r} is an adapter on {card['parent']!r}, not a model of "
                "its own; merge it, and serve and compress the merged model"
            )
        return cls(server, card)

    def check_limit(self, context: int | None, max_new_tokens: int) -> None:
        """Refuse a server whose longest sequence is too short for the completions (RacError)."""
        limit = self.card.get("max_model_len")
        if isinstance(limit, int) and limit <= max_new_tokens and limit < (context or limit + 1):
            raise RacError(
                f"{self.server} takes sequences of up to {limit} tokens, and max_new_tokens="
                f"{max_new_tokens} does not fit: start it with a larger --max-model-len"
            )

    def check_name(self, model: str) -> None:
        """Refuse a server whose model has another last name (RacError), if both names are known."""
        root = self.card.get("root")
        if not isinstance(root, str) or not model:
            return
        served, local = (public_name(name) for name in (root, os.path.abspath(model)))
        if PurePath(served).name.lower() != PurePath(local).name.lower():
            raise RacError(
                f"{self.server} serves {served!r}, and the model is {local!r}; name the model that "
                "is served, or, if they are the same under two names, set engine.model (rac eval: "
                f"--served-as) to {self.card['id']!r}"
            )


@torch.no_grad()
def check_probes(model: PreTrainedModel, probes: Sequence[Probe], server: str) -> None:
    """Refuse greedy tokens of another model or of much changed weights (RacError).

    The same weights in fewer bits pass. A probe costs a forward pass.
    """
    regrets: list[float] = []
    with evaluating(model):
        for probe in probes:
            ids = torch.tensor([[*probe.prompt_ids, *probe.completion_ids]], device=model.device)
            logits = model(input_ids=ids).logits[0, len(probe.prompt_ids) - 1 : -1].float()
            served = logits.gather(1, ids[0, len(probe.prompt_ids) :, None])[:, 0]
            regrets += (logits.amax(-1) - served).tolist()
    wrong = sum(not regret <= _REGRET for regret in regrets)  # not `>`: a NaN must not pass
    if wrong:
        name = model.config.name_or_path or type(model).__name__
        raise RacError(
            f"{server} holds another model than {name!r}: {wrong} of its {len(regrets)} greedy "
            f"tokens are up to {max(regrets):.1f} nats less likely than this one's choice; serve "
            "the model that is to be compressed, or set engine.verify_model: false"
        )
