"""Peak memory and CPU time of packing, inspecting and unpacking a checkpoint of many files.

    python -m bench scale --gb 30 --shard-gb 4

The model has layers of Qwen2.5-14B up to --gb, every linear layer 2:4 in bfloat16, and is
written file by file. Peak memory is the largest resident set of the process (`ru_maxrss`),
importing torch included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import RAC, child, save
from bench.shapes import random_mask

HIDDEN, INNER, VOCABULARY, KEYS = 5120, 13824, 152064, 1024
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
TINY: dict[str, Any] = {"gb": 0.6, "shard_gb": 0.3, "vocab": 64, "steps": ["check"]}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument(
        "--gb", type=float, default=6.0, help="size of the dense checkpoint, 1e9 bytes"
    )
    parser.add_argument("--shard-gb", type=float, default=1.6, help="largest file, 1e9 bytes")
    parser.add_argument("--vocab", type=int, default=VOCABULARY)
    steps = ["check", "pack", "inspect", "unpack"]
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps)


def tensors(layers: int, vocab: int) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the model; equal ones are one object."""
    torch.manual_seed(0)
    table = torch.randn(vocab, HIDDEN, dtype=torch.bfloat16)
    linear: dict[tuple[int, int], Tensor] = {}
    for shape in SHAPES.values():
        linear[shape] = torch.randn(shape, dtype=torch.bfloat16) * random_mask(*shape, "2:4")
    yield "model.embed_tokens.weight", table
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        for name, shape in SHAPES.items():
            yield f"{stem}.{name}.weight", linear[shape]
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                yield f"{stem}.{name}.bias", torch.zeros(shape[0], dtype=torch.bfloat16)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{stem}.{norm}.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    yield "model.norm.weight", torch.ones(HIDDEN, dtype=torch.bfloat16)
    yield "lm_head.weight", table


def make(folder: Path, options: argparse.Namespace) -> None:
    """Write the dense checkpoint of about `gb` 1e9 bytes in files of at most `shard_gb`."""
    layer = 2 * sum(rows * columns for rows, columns in SHAPES.values())
    layers = max(1, round((options.gb * 1e9 - 4 * options.vocab * HIDDEN) / layer))
    folder.mkdir(parents=True)
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, tensor in tensors(layers, options.vocab):
        if shards[-1] and size + tensor.nbytes > options.shard_gb * 1e9:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += tensor.nbytes
    where = {}
    for number, shard in enumerate(shards):
        file = f"model-{number:05}.safetensors"
        write_shard(folder / file, shard)
        where |= dict.fromkeys((name for name, _ in shard), file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {**CONFIG, "num_hidden_layers": layers, "vocab_size": options.vocab}
    (folder / "config.json").write_text(json.dumps(config))


def write_shard(path: Path, shard: list[tuple[str, Tensor]]) -> None:
    """Write a safetensors file; `save_file` refuses tensors that share memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in shard:
        place = [end, end + tensor.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": place}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in shard:
            file.write(tensor.view(torch.uint8).numpy().data)


def run(options: argparse.Namespace) -> None:
    """Make the checkpoint, run each step in a process of its own, and write the table."""
    work = options.work / "large"
    dense, packed = work / "dense", work / "packed"
    if work.exists():
        shutil.rmtree(work)
    # a process of its own: Linux counts a parent's memory into the peak of its children
    maker = multiprocessing.get_context("fork").Process(target=make, args=(dense, options))
    maker.start()
    maker.join()
    sizes = [file.stat().st_size for file in dense.glob("*.safetensors")]
    arguments = {
        "check": ["pack", str(dense), "--check"],
        "pack": ["pack", str(dense), str(packed)],
        "inspect": ["inspect", str(packed)],
        "unpack": ["unpack", str(packed), str(work / "unpacked")],
    }
    label = f"{sum(sizes) / 1e9:.2f} GB in {len(sizes)} files of at most {max(sizes) / 1e9:.2f} GB"
    rows = []
    for name in options.steps:
        _, peak, seconds = child([*RAC, *arguments[name]])
        rows.append([label, name, peak / 1e9, seconds])
    shutil.rmtree(work)
    columns = {"checkpoint": "", "step": "", "peak memory, GB": ".2f", "CPU seconds": ".0f"}
    save(options.out, "scale_packing", "layers of Qwen2.5-14B, random weights", columns, rows)
