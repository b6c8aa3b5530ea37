"""Hashes by which two runs compare their models and tokenizers, from memory or from files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from loguru import logger
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from rac_modifier.errors import RacError
from rac_modifier.runtime.files import public_name

_ELEMENTS = 64
_IF_THERE = {"_raise_exceptions_for_missing_entries": False}
_EXPERT = ("gate_proj", "up_proj", "down_proj")
_ARCHITECTURE_FIELDS = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act rms_norm_eps sliding_window tie_word_embeddings "
    "rope_parameters"
)


@dataclass(frozen=True)
class ModelIdentity:
    """The model whose traces are collected; its weights may stay on disk."""

    name: str
    source: str  # the folder or id that it was loaded from; empty for a model made in memory
    fingerprint: str
    generation_config: GenerationConfig | None
    vocab_size: int
    context: int | None  # longest sequence in tokens; None if the config does not say

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> ModelIdentity:
        """Return the identity of a model in memory."""
        return cls._of(model, model_fingerprint(model), model.generation_config)

    @classmethod
    def of_files(cls, source: str) -> ModelIdentity:
        """Return the identity of a model folder or hub id, equal to `of_model` of it loaded.

        If tensors have other names in the files than in the model (fused experts), the weights are
        loaded, with a warning.
        """
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(config)
            try:
                generation = GenerationConfig.from_pretrained(source)
            except OSError:
                generation = skeleton.generation_config  # as from_pretrained of the model does
            files = [cached_file(source, "model.safetensors", **_IF_THERE) or ""]
            if files == [""]:
                index = cached_file(source, "model.safetensors.index.json")
                files = list(get_checkpoint_shard_files(source, index)[0])
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RacError(f"the model {source!r} cannot be read ({reason})") from error
        fingerprint = _fingerprint_of_files(skeleton, files)
        if fingerprint is None:
            logger.warning(f"{source!r}: its tensors have other names in files; loading them")
            return cls.of_model(
                AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
            )
        return cls._of(skeleton, fingerprint, generation)

    @classmethod
    def _of(
        cls, model: PreTrainedModel, fingerprint: str, generation: GenerationConfig | None
    ) -> ModelIdentity:
        return cls(
            name=public_name(model.config.name_or_path or "") or type(model).__name__,
            source=model.config.name_or_path or "",
            fingerprint=fingerprint,
            generation_config=generation,
            vocab_size=cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings,
            context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        )


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash (64 hex digits) the architecture and up to 64 strided elements of each parameter.

    They are rounded to bfloat16: a model has the same fingerprint in float32 and in bfloat16.
    Pruning and fine-tuning change it. Offloaded parameters are read where they are stored.
    """
    values = ((n, _offloaded(model, n) if p.is_meta else p) for n, p in _named_parameters(model))
    return _fingerprint_of(model.config, _with_merged_experts(model, values))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the vocabulary (64 hex digits): equal hashes give token ids the same text."""
    vocab = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(vocab.encode()).hexdigest()


def _fingerprint_of(
    config: PreTrainedConfig, parameters: Iterable[tuple[str, torch.Tensor]]
) -> str:
    text = config.get_text_config()
    fields = {name: getattr(text, name, None) for name in _ARCHITECTURE_FIELDS.split()}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, weight in parameters:
        # odd: a multiple of the row length would only ever read one column
        stride = -(-weight.numel() // _ELEMENTS) | 1
        sample = weight.detach().reshape(-1)[::stride].cpu().to(torch.bfloat16).float()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _named_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of each module; a shared one twice, since offloading hides sharing."""
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{prefix}.{name}" if prefix else name, parameter


def _offloaded(model: PreTrainedModel, full: str) -> torch.Tensor:
    """Return the values that accelerate keeps while the parameter is on the meta device."""
    prefix, _, name = full.rpartition(".")
    hook = getattr(model.get_submodule(prefix), "_hf_hook", None)
    for attached in getattr(hook, "hooks", [hook]):
        weights = getattr(attached, "weights_map", None)
        if weights is not None:
            return weights[name]
    raise RacError(f"parameter {full!r} is on the meta device; load the model's weights first")


def _with_merged_experts(
    model: torch.nn.Module, parameters: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters in their order, split experts as merged tensors, as transformers loads them.

    Experts with other matrices, biases or transposed weights stay as they are.
    """
    layers = {name: module for name, module in model.named_modules() if _is_separate(module)}
    pending: dict[str, torch.Tensor] = {}
    for name, tensor in parameters:
        layer, is_expert, _ = name.rpartition(".experts.")
        layer = f"{layer}.experts"
        if not is_expert or layer not in layers:
            yield name, tensor
            continue
        pending[name] = tensor
        count: int = layers[layer].num_experts
        if len(pending) == count * len(_EXPERT):
            gate, up, down = (
                torch.stack([pending[f"{layer}.{i}.{name}.weight"] for i in range(count)])
                for name in _EXPERT
            )
            yield f"{layer}.gate_up_proj", torch.cat([gate, up], dim=1)
            yield f"{layer}.down_proj", down
            pending.clear()


def _is_separate(module: torch.nn.Module) -> bool:
    flags = [getattr(module, name, None) for name in ("is_transposed", "has_bias")]
    if not isinstance(module, torch.nn.ModuleList) or flags != [False, False]:
        return False
    count = getattr(module, "num_experts", 0)
    names = {name for expert in list(module)[:count] for name, _ in expert.named_parameters()}
    return count > 0 and names == {f"{name}.weight" for name in _EXPERT}


def _fingerprint_of_files(skeleton: PreTrainedModel, files: list[str]) -> str | None:
    """Return the fingerprint of the model loaded; None: parameter names differ."""
    from safetensors import safe_open

    with ExitStack() as stack:
        holder: dict[str, Any] = {}
        for path in filter(os.path.exists, files):
            file = stack.enter_context(safe_open(path, framework="pt"))
            holder.update(dict.fromkeys(file.keys(), file))
        # Tied parameters are one object; the first of its names that the files hold counts.
        parameters = list(_named_parameters(skeleton))
        stored = {id(parameter): name for name, parameter in reversed(parameters) if name in holder}
        if any(id(parameter) not in stored for _, parameter in parameters):
            return None

        def values() -> Iterator[tuple[str, torch.Tensor]]:
            for name, parameter in parameters:
                key = stored[id(parameter)]
                tensor = holder[key].get_tensor(key)  # mapped: only the sampled elements are read
                if tensor.shape != parameter.shape:
                    shapes = f"{tuple(tensor.shape)}, not {tuple(parameter.shape)} as config.json"
                    raise RacError(f"{key!r} has the shape {shapes}")
                yield name, tensor

        return _fingerprint_of(skeleton.config, values())
