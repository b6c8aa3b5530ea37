"""Hashes by which two runs compare their models and tokenizers, from memory or from files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
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
from rac_modifier.files import public_name
from rac_modifier.sampling.generate import eos_token_ids
from rac_modifier.sampling.merged_experts import MergedExperts, with_merged_experts

_ELEMENTS = 64
# Only what shapes the computation: the rest of a config (dtype, paths, library versions) changes without the model.
_ARCHITECTURE_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "sliding_window",
    "tie_word_embeddings",
    "rope_parameters",
)


@dataclass(frozen=True)
class ModelIdentity:
    """The model whose traces are collected; its weights may stay on disk."""

    name: str
    """For records and messages."""
    source: str
    """The folder or id that it was loaded from; empty for a model made in memory."""
    fingerprint: str
    generation_config: GenerationConfig | None
    vocab_size: int
    context: int | None
    """Longest sequence in tokens; None if the config does not say."""

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> ModelIdentity:
        """Return the identity of a model in memory."""
        return cls._of(model, model_fingerprint(model), model.generation_config)

    @classmethod
    def of_files(cls, source: str) -> ModelIdentity:
        """Return the identity of a model folder or Hugging Face id, equal to `of_model` of it loaded.

        It reads 64 numbers per parameter from safetensors files. If the tensors have other names there
        than in the model (fused experts), the weights are loaded, with a warning.

        Raises:
            RacError: no such model, or no safetensors files.
        """
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(config)
            generation = _generation_config(source, skeleton)
            files = _weight_files(source)
        except (OSError, ValueError) as error:
            raise RacError(
                f"the model {source!r} cannot be read ({str(error).strip().splitlines()[0]})"
            ) from error
        fingerprint = _fingerprint_of_files(skeleton, files)
        if fingerprint is None:
            logger.warning(
                f"{source!r}: tensors in its files have other names than in the model; loading the "
                "weights to identify it"
            )
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

    def eos(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Return every token id that ends a completion (see `eos_token_ids`)."""
        return tuple(eos_token_ids(self, tokenizer))


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash (64 hex digits) of the architecture and of up to 64 evenly strided elements of each parameter.

    Elements are rounded to bfloat16, so a model has the same fingerprint loaded in float32 and in
    bfloat16, whatever its files hold. It takes milliseconds for a small model, seconds for a large one.
    A change that misses all elements (an edited weight) is not detected; pruning and fine-tuning are.
    Parameters offloaded by accelerate or compressed-tensors are read where they are stored.

    Raises:
        RacError: a parameter has no values (meta device, not offloaded).
    """
    values = ((n, _offloaded(model, n) if p.is_meta else p) for n, p in named_parameters(model))
    return fingerprint_of(model.config, with_merged_experts(model, values))


def fingerprint_of(
    config: PreTrainedConfig, parameters: Iterable[tuple[str, torch.Tensor | MergedExperts]]
) -> str:
    """Return `model_fingerprint` of a config and of parameters in the order of `named_parameters`."""
    text = config.get_text_config()
    fields = {name: getattr(text, name, None) for name in _ARCHITECTURE_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, tensor in parameters:
        # Odd: a stride that is a multiple of the row length would only ever read one column.
        stride = -(-tensor.numel() // _ELEMENTS) | 1
        if isinstance(tensor, torch.Tensor):
            sample = tensor.detach().reshape(-1)[::stride].cpu().to(torch.bfloat16).float()
        else:
            sample = tensor.every(stride).to(torch.bfloat16).float()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash the vocabulary (64 hex digits): equal hashes give token ids the same text."""
    vocab = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(vocab.encode()).hexdigest()


def named_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of each module under their full names.

    A parameter that two modules share comes twice, since offloading hides that it is shared.
    """
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            yield full, parameter


def _offloaded(model: PreTrainedModel, full: str) -> torch.Tensor:
    """Return the values that accelerate keeps while the parameter is on the meta device."""
    prefix, _, name = full.rpartition(".")
    module = model.get_submodule(prefix)
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        weights = getattr(part, "weights_map", None)
        if weights is not None:
            return weights[name]
    raise RacError(
        f"parameter {full!r} is on the meta device and holds no values; load the model's weights first"
    )


def _generation_config(source: str, skeleton: PreTrainedModel) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return skeleton.generation_config  # as from_pretrained does for a model that brings none


def _weight_files(source: str) -> list[str]:
    whole = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        return [whole]
    index = cached_file(source, "model.safetensors.index.json")
    return list(get_checkpoint_shard_files(source, index)[0])


def _fingerprint_of_files(skeleton: PreTrainedModel, files: list[str]) -> str | None:
    """Return the fingerprint of the model loaded; None if a parameter has another name in the files."""
    from safetensors import safe_open

    with ExitStack() as stack:
        opened = [
            stack.enter_context(safe_open(file, framework="pt"))
            for file in files
            if Path(file).exists()
        ]
        holder: dict[str, Any] = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - no mapping
        # Tied parameters are one object; the first of its names that the files hold counts.
        parameters = list(named_parameters(skeleton))
        stored = {id(parameter): name for name, parameter in reversed(parameters) if name in holder}
        if any(id(parameter) not in stored for _, parameter in parameters):
            return None

        def values() -> Iterator[tuple[str, torch.Tensor]]:
            for name, parameter in parameters:
                key = stored[id(parameter)]
                tensor = holder[key].get_tensor(key)  # mapped: only the sampled elements are read
                if tensor.shape != parameter.shape:
                    raise RacError(
                        f"{key!r} has the shape {tuple(tensor.shape)}, not "
                        f"{tuple(parameter.shape)} as config.json"
                    )
                yield name, tensor

        return fingerprint_of(skeleton.config, values())
