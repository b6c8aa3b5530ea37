"""Batched sampling from a transformers model, where a completion does not depend on its neighbours in the batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, cast

import torch
from loguru import logger
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.model_tools import evaluating
from rac_modifier.sampling.decode import decode, grouped_attention
from rac_modifier.sampling.draw import Draw, row_keys
from rac_modifier.settings.sampling import SamplingSettings

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """One completion: its token ids with the EOS where the model produced one, never with padding."""

    ids: tuple[int, ...]
    finish_reason: FinishReason


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: SamplingSettings,
    keys: list[str],
) -> list[Generation]:
    """Complete one batch of prompts (left-padded, see `decode`); `keys` seed the rows.

    A row's draw depends on (seed, key, position) alone. Its logits still pass through matrix products whose rounding
    depends on the batch's shape; in float32 that almost never changes a token, in bfloat16 near-ties can flip.
    A completion that would leave the model's context ends there with finish_reason "length".

    Raises:
        RacError: an empty prompt, one that fills the context, token ids beyond the model's vocabulary, no EOS token.
    """
    if len(prompts) != len(keys):
        raise RacError(f"{len(prompts)} prompts but {len(keys)} keys; give each prompt one key")
    if not prompts:
        return []
    _check_prompts(model, prompts)
    settings = settings.resolved(model.generation_config)
    _warn_of_penalty(getattr(model.generation_config, "repetition_penalty", None))
    eos = eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    limits = _completion_limits(model, prompts, settings.max_new_tokens)

    with evaluating(model), grouped_attention(model):
        rows = decode(
            model,
            prompts,
            limits=limits,
            eos=eos,
            pad=pad,
            draw=Draw(
                settings.temperature or 0.0,
                settings.top_k or 0,
                1.0 if settings.top_p is None else settings.top_p,
            ),
            rows=row_keys(settings.seed, keys, model.device),
        )
    return [_cut(row, set(eos)) for row in rows]


class HasGenerationConfig(Protocol):
    """A model, or a `ModelIdentity`."""

    @property
    def generation_config(self) -> GenerationConfig | None:
        """The model's own, if it has one."""


def eos_token_ids(model: HasGenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token id that ends a completion: those of the model's generation_config, else the tokenizer's.

    Raises:
        RacError: neither names one.
    """
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = own if isinstance(own, list) else [tokenizer.eos_token_id if own is None else own]
    if not ids or ids[0] is None:
        raise RacError(
            "neither the model's generation_config nor its tokenizer names an EOS token: no completion would ever "
            "end; set model.generation_config.eos_token_id"
        )
    return [int(i) for i in ids]


def _check_prompts(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    vocab = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    for prompt in prompts:
        if not prompt:
            raise RacError("a prompt has no tokens; render it with render_prompt")
        if max(prompt) >= vocab:
            raise RacError(
                f"a prompt holds token id {max(prompt)}, beyond the model's vocabulary of {vocab}; "
                "load the tokenizer that belongs to this model"
            )


def _completion_limits(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int
) -> list[int]:
    """How many tokens each row may add; by its own prompt, whatever the longest prompt of the batch."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return [max_new_tokens] * len(prompts)
    longest = max(map(len, prompts))
    if longest >= context:
        raise RacError(
            f"a prompt of {longest} tokens fills the model's context of {context}; leave that problem out"
        )
    if longest + max_new_tokens > context:
        warn_of_cap(max_new_tokens, context)
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts]


@cache
def warn_of_cap(max_new_tokens: int, context: int) -> None:
    """Log, once, that completions can be shorter than the cap."""
    logger.warning(
        f"max_new_tokens={max_new_tokens} and the prompt do not fit the model's context of {context} tokens: "
        "completions end where the context does (finish_reason 'length')"
    )


@cache
def _warn_of_penalty(repetition_penalty: float | None) -> None:
    if repetition_penalty not in (None, 1.0):
        logger.warning(
            f"the model's generation_config sets repetition_penalty={repetition_penalty}, which is not applied here"
        )


def _cut(row: list[int], eos: set[int]) -> Generation:
    """End a padded row after its first EOS."""
    for index, token in enumerate(row):
        if token in eos:
            return Generation(tuple(row[: index + 1]), "stop")
    return Generation(tuple(row), "length")
