"""Whether a server holds the model to be compressed: by its list of models, and by greedy tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import torch
from transformers import PreTrainedModel

from rac_modifier.errors import RacError
from rac_modifier.files import public_name
from rac_modifier.model_tools import evaluating
from rac_modifier.sampling.engine import Probe
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
# Nats by which a token may be less likely than the model's own choice. The maximum over 96 tokens of
# the embedded reasoner is 0.0 if served in bfloat16, 0.1 in int8, 0.5 in int4 (round to nearest),
# 4.9 with half of the weights pruned, 18 with 70 %.
_REGRET = 1.0


def served_model(content: bytes, asked: str | None, server: str) -> dict[str, Any]:
    """Return the entry of GET /v1/models to sample from.

    That is the model that the settings ask for, or the only one that is not an adapter.

    Raises:
        RacError: no such list, no such model, several to choose from, or an adapter.
    """
    try:
        cards = {str(card["id"]): dict(card) for card in json.loads(content)["data"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RacError(
            f"{server}/models is not a list of models; is this an OpenAI-compatible server, and does "
            "the address end in /v1?"
        ) from error
    names = ", ".join(map(repr, cards)) or "none"
    if asked is not None and asked not in cards:
        raise RacError(
            f"{server} does not serve {asked!r}, but {names}; set engine.model to the one that is to "
            "be compressed"
        )
    bases = [name for name, card in cards.items() if not card.get("parent")]
    if asked is None and len(bases) != 1:
        raise RacError(
            f"{server} serves {names}; set engine.model to the one that is to be compressed"
        )
    card = cards[asked if asked is not None else bases[0]]
    if card.get("parent"):
        raise RacError(
            f"{server}: {card['id']!r} is an adapter on {card['parent']!r}, not a model of its own; "
            "merge it, and serve and compress the merged model"
        )
    return card


def check_limit(
    card: dict[str, Any], context: int | None, max_new_tokens: int, server: str
) -> None:
    """Compare the longest sequence of a server with the completions to sample.

    Raises:
        RacError: the limit is too short.
    """
    limit = card.get("max_model_len")
    if isinstance(limit, int) and limit <= max_new_tokens and limit < (context or limit + 1):
        longest = f" (the model has {context})" if context else ""
        raise RacError(
            f"{server} takes sequences of up to {limit} tokens, and max_new_tokens={max_new_tokens} "
            f"does not fit: start it with a larger --max-model-len{longest}, or sample fewer tokens"
        )


def check_name(card: dict[str, Any], model: str, server: str) -> None:
    """Compare the name of what a server loaded with the name of a model whose weights are elsewhere.

    A folder counts by its last name, a Hugging Face id and its folder in the cache by the name after
    the organisation.

    Raises:
        RacError: the names differ.
    """
    root = card.get("root")
    root = root if isinstance(root, str) else ""
    served, asked = _last_name(root), _last_name(os.path.abspath(model) if model else "")
    if served and asked and served != asked:
        raise RacError(
            f"{server} serves {public_name(root)!r}, and the model is {public_name(model)!r}; name the "
            "model that is served, or, if they are the same under two names, set engine.model (rac "
            f"eval: --served-as) to {card['id']!r}"
        )


def _last_name(model: str) -> str:
    """Return "b" for "/x/b", "a/b" and the hub's cache of a/b, and "" for "."."""
    return PurePath(public_name(model)).name.lower()


@torch.no_grad()
def check_probes(model: PreTrainedModel, probes: Sequence[Probe], server: str) -> None:
    """Compare greedy tokens of a server with the model's own choices: a short forward pass per probe.

    Another model fails, and so do weights that were changed much. The same weights in fewer bits pass.

    Raises:
        RacError: the model gives a token a log-probability more than a nat below its own choice.
    """
    regrets: list[float] = []
    with evaluating(model):
        for probe in probes:
            ids = torch.tensor([[*probe.prompt_ids, *probe.completion_ids]], device=model.device)
            logits = model(input_ids=ids).logits[0, len(probe.prompt_ids) - 1 : -1].float()
            served = logits.gather(1, ids[0, len(probe.prompt_ids) :, None])[:, 0]
            regrets += (logits.amax(-1) - served).tolist()
    # Not `>`: a NaN must not pass.
    if not all(regret <= _REGRET for regret in regrets):
        name = model.config.name_or_path or type(model).__name__
        wrong = sum(not regret <= _REGRET for regret in regrets)
        raise RacError(
            f"{server} holds another model than {name!r}: {wrong} of its {len(regrets)} greedy tokens "
            f"are far from what this one would write (up to {max(regrets):.1f} nats less likely than "
            "its own choice); serve the model that is to be compressed, or set engine.verify_model: "
            "false if you know that it is the same"
        )
