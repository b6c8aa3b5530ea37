"""Questions as token ids, and batched sampling; a completion does not depend on its neighbours."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.errors import RacError
from rac_modifier.problems.source import Problem
from rac_modifier.runtime.models import evaluating
from rac_modifier.runtime.progress import Phase
from rac_modifier.sampling.decode import decode, grouped_attention
from rac_modifier.sampling.draw import Draw, row_keys
from rac_modifier.settings.sampling import SamplingSettings

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """A completion: its token ids with the EOS that the model produced, never with padding."""

    ids: tuple[int, ...]
    finish_reason: FinishReason


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    settings: SamplingSettings,
    keys: list[str],
) -> list[Generation]:
    """Complete a batch of prompts; `keys` seed the rows.

    A draw depends on (seed, key, position) alone, logits on the batch's shape too, by rounding. A
    completion that would leave the model's context ends there with finish_reason "length". RacError
    for an empty prompt, one that fills the context, unknown token ids, no EOS token, or a model
    that does not read `past_key_values`.
    """
    if not prompts:
        return []
    limits = _completion_limits(model, prompts, settings.max_new_tokens)
    settings = settings.resolved(model.generation_config)
    top_p = 1.0 if settings.top_p is None else settings.top_p
    eos = eos_token_ids(model, tokenizer)
    with evaluating(model), grouped_attention(model):
        rows = decode(
            model,
            prompts,
            limits=limits,
            eos=eos,
            pad=eos[0],  # a tokenizer's may be beyond the embedding
            draw=Draw(settings.temperature or 0.0, settings.top_k or 0, top_p),
            rows=row_keys(settings.seed, keys, model.device),
        )
    return [_cut(row, set(eos)) for row in rows]


def sample_sequences(
    model: Any, tokenizer: Any, problems: Sequence[Problem], sampling: SamplingSettings
) -> list[tuple[tuple[int, ...], int]]:
    """Complete each problem `samples_per_problem` times, as traces are sampled.

    Return the token ids of prompt and completion, and the length of the prompt.
    """
    requests = [
        (f"{p.id}#{i}", p.question) for p in problems for i in range(sampling.samples_per_problem)
    ]
    size = sampling.batch_size
    batches = [requests[i : i + size] for i in range(0, len(requests), size)]
    sequences: list[tuple[tuple[int, ...], int]] = []
    with Phase("samples", len(batches), unit="batches") as phase:
        for batch in batches:
            prompts = [render_question(tokenizer, question, sampling) for _, question in batch]
            generations = generate(model, tokenizer, prompts, sampling, [key for key, _ in batch])
            pairs = zip(prompts, generations, strict=True)
            sequences.extend(((*p, *g.ids), len(p)) for p, g in pairs)
            phase.advance()
    return sequences


def eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token id that ends a completion of a model, or of its `ModelIdentity`.

    generation_config and the tokenizer name them. vLLM stops at both, too.
    """
    named = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    ids = [int(i) for i in dict.fromkeys(ids) if i is not None]
    if not ids:
        raise RacError("the model has no EOS token; set model.generation_config.eos_token_id")
    return ids


def _completion_limits(
    model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int
) -> list[int]:
    """Check model and prompts; return the number of tokens that each row may add."""
    reads = inspect.signature(model.forward).parameters
    if "cache_params" in reads and "past_key_values" not in reads:  # Mamba: it would be ignored
        raise RacError(
            f"{type(model).__name__} keeps its state in cache_params, which is not passed on here; "
            "sample with a server (traces.engine, or rac eval --server)"
        )
    vocab = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    for prompt in prompts:
        if not prompt:
            raise RacError("a prompt has no tokens; render it with render_question")
        if max(prompt) >= vocab:
            raise RacError(
                f"a prompt holds token id {max(prompt)}, beyond the model's vocabulary of {vocab}; "
                "load this model's tokenizer"
            )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return [max_new_tokens] * len(prompts)
    longest = max(map(len, prompts))
    if longest >= context:
        raise RacError(f"a prompt of {longest} tokens fills the model's context of {context}")
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts]


def _cut(row: list[int], eos: set[int]) -> Generation:
    """End a padded row after its first EOS."""
    for index, token in enumerate(row):
        if token in eos:
            return Generation(tuple(row[: index + 1]), "stop")
    return Generation(tuple(row), "length")


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
