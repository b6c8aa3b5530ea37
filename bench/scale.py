"""Peak memory and CPU time of packing, inspecting and unpacking a checkpoint of many files.

    python -m bench scale --gb 30 --shard-gb 4

The model has layers of Qwen2.5-14B up to --gb, every linear layer 2:4 in bfloat16, and is
written file by file. Peak memory is the largest resident set of the process (`ru_maxrss`),
importing torch included.
"""

import argparse
import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from bench.common import RAC, called_in_child, save
from bench.shapes import random_mask

HIDDEN = 5120
TINY = "--gb 0.6 --shard-gb 0.3 --vocab 64 --steps check"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--gb", type=float, default=6.0, help="of the dense checkpoint")
    parser.add_argument("--shard-gb", type=float, default=1.6, help="largest file, 1e9 bytes")
    parser.add_argument("--vocab", type=int, default=152064)
    steps = ["check", "pack", "inspect", "unpack"]
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps)


def without_data(layers: int, vocab: int) -> Any:
    """Return a model of Qwen2.5-14B's layers on the meta device."""
    config = Qwen2Config(
        hidden_size=HIDDEN,
        intermediate_size=13824,
        num_attention_heads=40,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        vocab_size=vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        return Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)


@cache
def values(shape: torch.Size, sparse: bool) -> Tensor:
    """Return the values of every tensor of a shape; `sparse`: 2:4."""
    weight = torch.randn(shape, dtype=torch.bfloat16)
    return weight * random_mask(*shape, "2:4") if sparse else weight


def make(folder: Path, options: argparse.Namespace) -> None:
    """Write the dense checkpoint of about `gb` 1e9 bytes in files of at most `shard_gb`."""
    torch.manual_seed(0)
    layer = 2 * sum(p.numel() for p in without_data(1, 64).model.layers[0].parameters())
    layers = max(1, round((options.gb * 1e9 - 4 * options.vocab * HIDDEN) / layer))
    model = without_data(layers, options.vocab)
    state = model.state_dict()
    plan = split_torch_state_dict_into_shards(state, max_shard_size=int(options.shard_gb * 1e9))
    model.config.save_pretrained(folder)
    for file, names in plan.filename_to_tensors.items():
        shapes = {name: state[name].shape for name in names}
        shard = {n: values(s, len(s) == 2 and "layers" in n).clone() for n, s in shapes.items()}
        save_file(shard, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": plan.tensor_to_filename}
    if plan.is_sharded:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run(options: argparse.Namespace) -> None:
    """Make the checkpoint, run each step in a process of its own, and write the table."""
    work = options.work / "large"
    dense, packed = work / "dense", work / "packed"
    if work.exists():
        shutil.rmtree(work)
    # in a process: Linux counts a parent's memory into the peak of its children
    called_in_child(make, dense, options)
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
        process = subprocess.Popen([*RAC, *arguments[name]])
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"rac {arguments[name][0]} failed")
        rows.append([label, name, usage.ru_maxrss * 1024 / 1e9, usage.ru_utime + usage.ru_stime])
    shutil.rmtree(work)
    columns = {"checkpoint": "", "step": "", "peak memory, GB": ".2f", "CPU seconds": ".0f"}
    save(options.out, "scale_packing", "layers of Qwen2.5-14B, random weights", columns, rows)
