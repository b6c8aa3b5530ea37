"""What a run does beside statistics and solver, timed on this CPU: for scale_measured.py.

Timed are layers with random weights in float32, with heads of 64 numbers as in Qwen2.5-0.5B, in seconds of the processor, so
without waiting for the disk. Loading and saving are scaled by bytes, packing by weights, the divergence by layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from random_model import random_zeros
from scale_models import Model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rac_modifier.checkpoint.packing import pack_checkpoint
from rac_modifier.evaluation.dense_reference import DenseReference
from rac_modifier.settings.pattern import Pattern

LAYERS = 4  # that are saved, loaded and packed
LENGTH = 2048  # tokens of the trace that passes through a layer, and of the traces of each of the two divergences
_BYTES = 4  # of a weight


@dataclass(frozen=True)
class Parts:
    """Seconds of the processor: of one token in a forward pass of one layer, and of what the first process does alone."""

    forward: float
    alone: dict[str, float]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Seconds of the processor inside, as `name`."""
    started = time.process_time()
    yield
    seconds[name] = time.process_time() - started


def random_layers(shape: Model, layers: int, vocabulary: int) -> Qwen2ForCausalLM:
    """With attention in eager mode, as llm-compressor traces it."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=layers,
        num_attention_heads=shape.queries // 64,
        num_key_value_heads=shape.keys // 64,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
    )
    return Qwen2ForCausalLM._from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def files(shape: Model, folder: Path) -> dict[str, float]:
    """Seconds of loading, saving and packing the whole model; writes LAYERS of its layers to `folder`."""
    model = random_layers(shape, LAYERS, 256)
    pattern = Pattern.n_of_m(2, 4)
    linears = {
        name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)
    }
    linears.pop("lm_head")
    for linear in linears.values():
        linear.weight.data.masked_fill_(random_zeros(linear.weight, pattern), 0)
    found: dict[str, float] = {}
    with timed(found, "saving"):
        model.save_pretrained(folder)
    with timed(found, "loading"):
        for weight in AutoModelForCausalLM.from_pretrained(folder).parameters():
            weight.data.clone()  # the file is mapped, and read where it is used
    with timed(found, "packing"):
        pack_checkpoint(folder, dict.fromkeys(linears, "2:4"))
    here = _BYTES * sum(weight.numel() for weight in model.parameters())
    embedding = _BYTES * shape.vocabulary * shape.hidden
    whole = embedding + _BYTES * shape.layers * sum(group.weights for group in shape.layer())
    loading, saving = (found[name] * whole / here for name in ("loading", "saving"))
    copied = (
        (loading + saving) * embedding / whole
    )  # the embedding, which is not packed, is read and written
    return {
        "loading": loading,
        "saving": saving,
        "packing": found["packing"] * shape.layers / LAYERS + copied,
    }


def divergences(shape: Model) -> tuple[float, float]:
    """Seconds of a token in a layer, and of the divergence of the whole model on held-out and on calibrated traces."""
    model = random_layers(shape, 1, shape.vocabulary)
    traces = [(tuple(torch.randint(shape.vocabulary, (LENGTH,)).tolist()), 1)]
    DenseReference(model, traces)  # oneDNN makes its code
    found: dict[str, float] = {}
    with timed(found, "layer"):  # without the head
        reference = DenseReference(model, traces)
    with timed(found, "compared"):
        reference.divergence(model, label="0.5B")
    whole = 2 * shape.layers * found["layer"] + max(
        found["compared"] - found["layer"], 0.0
    )  # dense, pruned; heads
    return found["layer"] / LENGTH, 2 * whole


def parts(shape: Model, folder: Path) -> Parts:
    """Of a whole run of `shape`; `folder` must be new."""
    alone = files(shape, folder)
    forward, divergence = divergences(shape)
    return Parts(forward, {**alone, "held-out divergence": divergence})
