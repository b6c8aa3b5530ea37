"""Memory and time of a checkpoint of many files: made shard by shard, then planned, packed, inspected and loaded by children.

    python benchmarks/large_checkpoint.py --gb 8 --shard-gb 2 --out /tmp/large
    python benchmarks/large_checkpoint.py --gb 30 --shard-gb 4 --out /tmp/large --steps pack

The model has the layers of Qwen2.5-14B, as many as the size asks for, every linear layer 2:4 in bfloat16. All layers hold the
same random numbers, which changes no size. Peak memory is `ru_maxrss` of a child process, the largest resident set of its
life: its own memory and the mapped pages of files, not the page cache of files that it reads or writes. What importing
torch takes is in it, and stands in a row of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from random_model import random_zeros, size_on_disk
from torch import Tensor

from rac_modifier.settings.pattern import Pattern

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
    "vocab_size": VOCABULARY,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
COMMAND = "import sys; from rac_modifier.cli import main; sys.argv[0] = 'rac'; main()"
STEPS = {
    "import": "import torch, transformers",
    "check": COMMAND,
    "pack": COMMAND,
    "inspect": COMMAND,
    "unpack": COMMAND,
    "load": "import sys; from rac_modifier.checkpoint.load import load_model; load_model(sys.argv[1], dtype='auto')",
}


def tensors(layers: int) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model, one at a time; equal ones are one object."""
    torch.manual_seed(0)
    table = torch.randn(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
    linear: dict[tuple[int, int], Tensor] = {}
    for shape in SHAPES.values():
        if shape not in linear:
            weight = torch.randn(shape, dtype=torch.bfloat16)
            linear[shape] = weight.masked_fill_(random_zeros(weight, Pattern.n_of_m(2, 4)), 0)
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


def make(folder: Path, gb: float, shard_gb: float) -> int:
    """Write the dense checkpoint of about `gb` 1e9 bytes in files of at most `shard_gb`; the number of files."""
    layer = 2 * sum(rows * columns for rows, columns in SHAPES.values())
    layers = max(1, round((gb * 1e9 - 4 * VOCABULARY * HIDDEN) / layer))
    folder.mkdir(parents=True)
    where: dict[str, str] = {}
    shard: list[tuple[str, Tensor]] = []
    number = 0

    def flush() -> None:
        nonlocal shard, number
        number += 1
        name = f"model-{number:05}.safetensors"
        write_shard(folder / name, shard)
        where.update(dict.fromkeys((key for key, _ in shard), name))
        shard = []

    for name, tensor in tensors(layers):
        if shard and sum(held.nbytes for _, held in shard) + tensor.nbytes > shard_gb * 1e9:
            flush()
        shard.append((name, tensor))
    flush()
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return number


def write_shard(path: Path, held: list[tuple[str, Tensor]]) -> None:
    """A safetensors file. Not by `save_file`, which refuses tensors that share memory."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in held:
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }  # type: ignore[dict-item]
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in held:
            file.write(tensor.view(torch.uint8).numpy().data)


def child(code: str, arguments: list[str]) -> tuple[int, float, float]:
    """Run Python code in a process of its own: peak of its resident set in bytes, seconds, and seconds of the processor.

    Its output is not shown.
    """
    begun = time.monotonic()
    number = os.fork()
    if number == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execv(sys.executable, [sys.executable, "-P", "-c", code, *arguments])
    _, status, usage = os.wait4(number, 0)
    if code := os.waitstatus_to_exitcode(status):  # type: ignore[assignment]
        sys.exit(f"{arguments}: ended with {code}")
    return usage.ru_maxrss * 1024, time.monotonic() - begun, usage.ru_utime + usage.ru_stime


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gb", type=float, default=8.0, help="size of the dense checkpoint, 1e9 bytes"
    )
    parser.add_argument("--shard-gb", type=float, default=2.0, help="largest file, 1e9 bytes")
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder, which takes 1.6 times the size"
    )
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    asked = parser.parse_args()
    dense, packed = asked.out / "dense", asked.out / "packed"
    arguments = {
        "import": [],
        "check": ["pack", str(dense), "--check"],
        "pack": ["pack", str(dense), str(packed)],
        "inspect": ["inspect", str(packed)],
        "unpack": ["unpack", str(packed), str(asked.out / "unpacked")],
        "load": [str(packed)],
    }
    if not dense.exists():
        number = os.fork()  # so that its memory is given back, and is no child's
        if number == 0:
            make(dense, asked.gb, asked.shard_gb)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]):
            sys.exit(f"{dense}: could not be made")
    files = sorted(dense.glob("*.safetensors"))
    largest = max(file.stat().st_size for file in files)
    print(
        f"dense: {size_on_disk(dense):,} bytes in {len(files)} files of at most {largest:,}",
        flush=True,
    )
    print(
        "| step | peak of the resident set | in largest files | time | of the processor |",
        "|---|---|---|---|---|",
        sep="\n",
        flush=True,
    )
    for step in STEPS:
        if step in asked.steps:
            peak, seconds, busy = child(STEPS[step], arguments[step])
            print(
                f"| {step} | {peak / 1e9:.2f} GB | {peak / largest:.2f} | {seconds:.0f} s | {busy:.0f} s |",
                flush=True,
            )
    if packed.exists():
        print(f"packed: {size_on_disk(packed):,} bytes", flush=True)
    if not asked.keep:
        shutil.rmtree(asked.out)


if __name__ == "__main__":
    main()
