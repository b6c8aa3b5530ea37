"""Batched sampling from a transformers model, where a completion does not depend on its neighbours in the batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol, cast

import torch
from loguru import logger
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rac_modifier.errors import RacError
from rac_modifier.traces.decode import decode
from rac_modifier.traces.gumbel import row_keys
from rac_modifier.traces.prompts import Template, render_prompt

FinishReason = Literal["stop", "length"]

DEFAULT_TEMPERATURE, DEFAULT_TOP_P, DEFAULT_TOP_K = 0.6, 0.95, 0


class SamplingSettings(BaseModel):
    """How completions are sampled; None means as the model's own generation_config says (see `resolved`).

    Only temperature, top_k and top_p shape the distribution: a repetition penalty in the model's generation_config is
    not applied (a warning says so).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: float | None = Field(default=None, ge=0, description="0 is greedy")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, description="0 is off")
    max_new_tokens: int = Field(default=8192, ge=1)
    samples_per_problem: int = Field(default=1, ge=1)
    batch_size: int = Field(
        default=64, ge=1, description="completions sampled together; does not change what is sampled"
    )
    seed: int = 0
    system_prompt: str | None = None
    template: Template = Field(default="chat", description="'none' gives the model the bare question")
    thinking: bool = Field(
        default=True, description="the chat template's enable_thinking, where it knows the switch (Qwen3)"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> SamplingSettings:
        if self.temperature == 0 and self.samples_per_problem > 1:
            raise RacError(
                f"samples_per_problem={self.samples_per_problem} at temperature 0 would give the same completion each "
                "time; use samples_per_problem=1 or a temperature above 0"
            )
        if self.template == "none" and self.system_prompt is not None:
            raise RacError("template='none' has no place for a system_prompt; drop it or use template='chat'")
        return self

    def render(self, tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
        """Token ids of the prompt for a question (see `render_prompt`)."""
        return render_prompt(tokenizer, question, self.system_prompt, self.template, self.thinking)

    def resolved(self, generation_config: GenerationConfig | None) -> SamplingSettings:
        """These settings with nothing left open.

        What is None comes from the model's generation_config if that one samples (do_sample), and where it is silent
        too, from the usual settings of reasoning models: temperature 0.6, top_p 0.95, top_k off. (Not from
        transformers' own defaults, of which top_k=50 would be one.)
        """
        usual: dict[str, Any] = {"temperature": DEFAULT_TEMPERATURE, "top_p": DEFAULT_TOP_P, "top_k": DEFAULT_TOP_K}
        own = generation_config if generation_config is not None and generation_config.do_sample else None
        filled = self.model_dump()
        for name, default in usual.items():
            if filled[name] is None:
                value = getattr(own, name, None)
                filled[name] = default if value is None else value
        return SamplingSettings(**filled)


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
    _tell_what_is_not_applied(getattr(model.generation_config, "repetition_penalty", None))
    eos = eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    limits = _completion_limits(model, prompts, settings.max_new_tokens)

    training = model.training
    model.eval()
    try:
        rows = decode(
            model,
            prompts,
            limits=limits,
            eos=eos,
            pad=pad,
            warpers=_warpers(settings),
            rows=row_keys(settings.seed, keys, model.device) if settings.temperature else None,
        )
    finally:
        model.train(training)
    return [_cut(row, set(eos)) for row in rows]


class HasGenerationConfig(Protocol):
    """A model, or what stands for one."""

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


def _completion_limits(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> list[int]:
    """How many tokens each row may add: per row, so that a long prompt elsewhere in the batch takes nothing away."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return [max_new_tokens] * len(prompts)
    longest = max(map(len, prompts))
    if longest >= context:
        raise RacError(f"a prompt of {longest} tokens fills the model's context of {context}; leave that problem out")
    if longest + max_new_tokens > context:
        _tell_capped(max_new_tokens, context)
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts]


@cache
def _tell_capped(max_new_tokens: int, context: int) -> None:
    logger.warning(
        f"max_new_tokens={max_new_tokens} and the prompt do not fit the model's context of {context} tokens: "
        "completions end where the context does (finish_reason 'length')"
    )


@cache
def _tell_what_is_not_applied(repetition_penalty: float | None) -> None:
    if repetition_penalty not in (None, 1.0):
        logger.warning(
            f"the model's generation_config asks for repetition_penalty={repetition_penalty}: not applied here"
        )


def _warpers(settings: SamplingSettings) -> LogitsProcessorList:
    """Temperature, top-k and top-p in transformers' order; nothing at temperature 0."""
    warpers = LogitsProcessorList()
    if settings.temperature:
        if settings.temperature != 1:
            warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p is not None and settings.top_p < 1:
            warpers.append(TopPLogitsWarper(settings.top_p))
    return warpers


def _cut(row: list[int], eos: set[int]) -> Generation:
    """End a padded row behind its first EOS."""
    for index, token in enumerate(row):
        if token in eos:
            return Generation(tuple(row[: index + 1]), "stop")
    return Generation(tuple(row), "length")
