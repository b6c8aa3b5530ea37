"""Short hashes that say whether two runs had the same model and the same tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.errors import RacError

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


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash (64 hex digits) of the architecture and of up to 64 evenly strided elements of each parameter.

    Elements are compared as float32, so a bfloat16 checkpoint has one fingerprint in bfloat16 and upcast to float32. It
    reads 64 numbers a parameter, milliseconds for a small model and seconds for a large one; a change that misses all
    of them (one edited weight) goes unseen, pruning or fine-tuning does not. Parameters offloaded by accelerate or
    compressed-tensors are read where they lie.

    Raises:
        RacError: a parameter has no values (meta device, not offloaded).
    """
    values = ((n, _offloaded(model, n) if p.is_meta else p) for n, p in named_parameters(model))
    return fingerprint_of(model.config, values)


def fingerprint_of(config: PreTrainedConfig, parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """`model_fingerprint` of a config and of the parameters in the order of `named_parameters`."""
    text = config.get_text_config()
    fields = {name: getattr(text, name, None) for name in _ARCHITECTURE_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, tensor in parameters:
        flat = tensor.detach().reshape(-1)
        # Odd: a stride that is a multiple of the row length would only ever read one column.
        stride = -(-flat.numel() // _ELEMENTS) | 1
        sample = flat[::stride].to(device="cpu", dtype=torch.float32)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash (64 hex digits) of the vocabulary: equal means that token ids mean the same text."""
    vocab = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(vocab.encode()).hexdigest()


def named_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Each module's own parameters under their full names.

    One shared by two modules comes twice, since offloading hides that it is shared.
    """
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            yield full, parameter


def _offloaded(model: PreTrainedModel, full: str) -> torch.Tensor:
    """The values that accelerate keeps elsewhere while the parameter itself is on the meta device."""
    prefix, _, name = full.rpartition(".")
    module = model.get_submodule(prefix)
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            return weights[name]
    raise RacError(f"parameter {full!r} is on the meta device and holds no values; load the model's weights first")
