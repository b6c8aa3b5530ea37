"""The model whose traces are collected, as far as collecting needs to know it: its weights may stay on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from loguru import logger
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from rac_modifier.errors import RacError
from rac_modifier.machine_paths import public_name
from rac_modifier.sampling.generate import eos_token_ids
from rac_modifier.sampling.model_identity import fingerprint_of, model_fingerprint, named_parameters


@dataclass(frozen=True)
class Subject:
    """Name, fingerprint and limits of a model."""

    name: str
    fingerprint: str
    generation_config: GenerationConfig | None
    vocab_size: int
    context: int | None
    """Most tokens of a sequence, where the config says so."""

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Subject:
        """Of a model in memory."""
        return cls._of(model, model_fingerprint(model), model.generation_config)

    @classmethod
    def of_files(cls, source: str) -> Subject:
        """Of a model folder or Hugging Face id: reads 64 numbers a parameter out of its safetensors files.

        The result equals that of `of_model` for the same model loaded. Where the files name their tensors otherwise than
        the model does (fused experts), the weights are loaded after all, and a message says so.

        Raises:
            RacError: no such model, or no safetensors files.
        """
        try:
            config = AutoConfig.from_pretrained(source)
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(config)
            generation = _generation_config(source, skeleton)
            files = _files(source)
        except (OSError, ValueError) as error:
            raise RacError(f"the model {source!r} cannot be read ({str(error).strip().splitlines()[0]})") from error
        fingerprint = _fingerprint(skeleton, files)
        if fingerprint is None:
            logger.warning(f"{source!r} names its tensors otherwise than the model: loading the weights to identify it")
            return cls.of_model(AutoModelForCausalLM.from_pretrained(source, dtype="auto"))
        return cls._of(skeleton, fingerprint, generation)

    @classmethod
    def _of(cls, model: PreTrainedModel, fingerprint: str, generation: GenerationConfig | None) -> Subject:
        return cls(
            name=public_name(model.config.name_or_path or "") or type(model).__name__,
            fingerprint=fingerprint,
            generation_config=generation,
            vocab_size=cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings,
            context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        )

    def eos(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Every token id that ends a completion (see `eos_token_ids`)."""
        return tuple(eos_token_ids(self, tokenizer))


def _generation_config(source: str, skeleton: PreTrainedModel) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return skeleton.generation_config  # as from_pretrained does for a model that brings none


def _files(source: str) -> list[str]:
    whole = cached_file(source, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if whole is not None:
        return [whole]
    index = cached_file(source, "model.safetensors.index.json")
    return list(get_checkpoint_shard_files(source, index)[0])


def _fingerprint(skeleton: PreTrainedModel, files: list[str]) -> str | None:
    """The fingerprint that the loaded model would have; None if a parameter is not in the files under its name."""
    from safetensors import safe_open

    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files if Path(file).exists()]
        holder: dict[str, Any] = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - no mapping
        # Tied parameters are one object; the first of its names that the files hold counts.
        parameters = list(named_parameters(skeleton))
        stored = {id(parameter): name for name, parameter in reversed(parameters) if name in holder}
        if any(id(parameter) not in stored for _, parameter in parameters):
            return None

        def values() -> Iterator[tuple[str, torch.Tensor]]:
            for name, parameter in parameters:
                key = stored[id(parameter)]
                tensor = holder[key].get_tensor(key)  # mapped from the file: only what is looked at is read
                if tensor.shape != parameter.shape:
                    raise RacError(
                        f"{key!r} has the shape {tuple(tensor.shape)}, not {tuple(parameter.shape)} as config.json"
                    )
                yield name, tensor

        return fingerprint_of(skeleton.config, values())
