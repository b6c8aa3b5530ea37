"""Whether a server holds the model that is to be compressed: by what it lists, and by a few greedy tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from transformers import PreTrainedModel

from rac_modifier.errors import RacError
from rac_modifier.machine_paths import public_name
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
# Nats by which a token may be less likely than the model's own choice. On the embedded reasoner, the maximum over 96 tokens is
# 0.0 if served in bfloat16, 0.1 in int8, 0.5 in int4 (round to nearest), 4.9 with half of the weights pruned, 18 with 70 %.
_REGRET = 1.0


def served_model(content: bytes, wanted: str | None, server: str) -> dict[str, Any]:
    """The entry of GET /v1/models to sample from: the one that the settings name, or the only one that is not an adapter.

    Raises:
        RacError: no such list, no such model, several to choose from, or an adapter.
    """
    try:
        cards = {str(card["id"]): dict(card) for card in json.loads(content)["data"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RacError(
            f"{server}/models is not a list of models; is this an OpenAI-compatible server, and does the address end in /v1?"
        ) from error
    names = ", ".join(map(repr, cards)) or "none"
    if wanted is not None and wanted not in cards:
        raise RacError(
            f"{server} does not serve {wanted!r}, but {names}; set engine.model to the one that is to be compressed"
        )
    bases = [name for name, card in cards.items() if not card.get("parent")]
    if wanted is None and len(bases) != 1:
        raise RacError(
            f"{server} serves {names}; set engine.model to the one that is to be compressed"
        )
    card = cards[wanted if wanted is not None else bases[0]]
    if card.get("parent"):
        raise RacError(
            f"{server}: {card['id']!r} is an adapter on {card['parent']!r}, not a model of its own; merge it, and serve and "
            "compress the merged model"
        )
    return card


def check_card(
    card: dict[str, Any], model: str, context: int | None, max_new_tokens: int, server: str
) -> None:
    """Compare the entry in a server's list with the model: the config.json of its folder, and its longest sequence.

    Raises:
        RacError: the folder that the server loaded holds another model, or the limit is too short.
    """
    root = card.get("root")
    if (
        isinstance(root, str)
        and model
        and Path(root).is_dir()
        and Path(model).is_dir()
        and _config(root) != _config(model)
    ):
        raise RacError(
            f"{server} serves {root!r}, whose config.json differs from that of {model!r}; serve the model that is to be "
            "compressed (traces must be its own)"
        )
    limit = card.get("max_model_len")
    if isinstance(limit, int) and limit <= max_new_tokens and limit < (context or limit + 1):
        raise RacError(
            f"{server} takes sequences of up to {limit} tokens, and max_new_tokens={max_new_tokens} does not fit: start it "
            f"with a larger --max-model-len{f' (the model has {context})' if context else ''}, or sample fewer tokens"
        )


def check_name(card: dict[str, Any], model: str, server: str) -> None:
    """Compare the name of what a server loaded with that of the model, where no weights are here to compare.

    A folder counts by its own name, a Hugging Face id and its folder in the cache by the name behind the organisation.

    Raises:
        RacError: they differ.
    """
    root = card.get("root")
    root = root if isinstance(root, str) else ""
    served, own = _last_name(root), _last_name(os.path.abspath(model) if model else "")
    if served and own and served != own:
        raise RacError(
            f"{server} serves {public_name(root)!r}, and the model to be evaluated is {public_name(model)!r}; name the model "
            "that is served, or, if they are the same under two names, set engine.model (rac eval: --served-as) to "
            f"{card['id']!r}"
        )


def _last_name(model: str) -> str:
    """What stays the same wherever a model is: "b" of "/x/b", "a/b" and the hub's cache of a/b; "" of "."."""
    return PurePath(public_name(model)).name.lower()


@torch.no_grad()
def check_probes(model: PreTrainedModel, probes: Sequence[Probe], server: str) -> None:
    """Compare greedy tokens of a server with the model's own choice at each of their positions.

    Another model fails, and so do weights that were changed much; the same weights stored in fewer bits pass. It takes one short
    forward pass per probe.

    Raises:
        RacError: the model gives a token a log-probability more than one nat below that of its own choice.
    """
    regrets: list[float] = []
    with evaluating(model):
        for probe in probes:
            ids = torch.tensor([[*probe.prompt_ids, *probe.completion_ids]], device=model.device)
            logits = model(input_ids=ids).logits[0, len(probe.prompt_ids) - 1 : -1].float()
            taken = logits.gather(1, ids[0, len(probe.prompt_ids) :, None])[:, 0]
            regrets += (logits.amax(-1) - taken).tolist()
    # Not `>`: a NaN must not pass.
    if not all(regret <= _REGRET for regret in regrets):
        name = model.config.name_or_path or type(model).__name__
        wrong = sum(not regret <= _REGRET for regret in regrets)
        raise RacError(
            f"{server} holds another model than {name!r}: {wrong} of its {len(regrets)} greedy tokens are far from what this one "
            f"would write (up to {max(regrets):.1f} nats less likely than its own choice); serve the model that is to be "
            "compressed, or set engine.verify_model: false if you know that it is the same"
        )


def _config(folder: str) -> Any:
    """The fields of a config.json that belong to the model; the others change from one save to the next."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {
        k: v
        for k, v in config.items()
        if k not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    }
