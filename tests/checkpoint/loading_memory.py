"""Memory of `from_pretrained` of a packed checkpoint of many files: `python -m tests.checkpoint.loading_memory` in a new folder.

Prints as JSON the bytes of the dense model, of the packed files and of the largest of them, and by how much the process grew at
most beyond the dense model: in its own memory, and with the mapped pages of files. Both are looked up every two milliseconds in
a fork of this process, which has loaded a small checkpoint before.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rac_modifier.checkpoint.convert import pack_model
from rac_modifier.checkpoint.pack_plan import plan_packing

LAYERS, FILE = 10, "17MB"  # at most, of the dense checkpoint: a layer each


def make(name: str, hidden: int) -> None:
    """A packed 2:4 checkpoint of float32 layers, and the dense one that it is made of."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
    )
    model = Qwen2ForCausalLM._from_config(config, dtype=torch.float32)
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data.view(-1, 4)[:, :2] = 0
    model.save_pretrained(f"{name}-dense", max_shard_size=FILE)
    pack_model(plan_packing(Path(f"{name}-dense")), name, "model")


def held() -> dict[str, int]:
    """Bytes of this process that are resident: its own, and with the pages of files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    found = {
        words[0]: 1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "VmRSS:")
    }
    return {"own": found["RssAnon:"], "with files": found["VmRSS:"]}


def growth(step: Callable[[], object]) -> dict[str, int]:
    """By how many bytes a fork of this process grows at most while it does `step`."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        before, most, stop = held(), held(), threading.Event()

        def watch() -> None:
            while not stop.wait(0.002):
                for name, count in held().items():
                    most[name] = max(most[name], count)

        try:
            thread = threading.Thread(target=watch)
            thread.start()
            step()
            stop.set()
            thread.join()
            os.write(
                writes, json.dumps({name: most[name] - before[name] for name in most}).encode()
            )
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        found = pipe.read()
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
    return json.loads(found)


def main() -> None:
    """See above."""
    torch.set_num_threads(1)
    make("small", 32)
    AutoModelForCausalLM.from_pretrained("small")
    growth(lambda: make("large", 512))  # in a fork, since freed memory would be used again below
    model = sum(path.stat().st_size for path in Path("large-dense").glob("*.safetensors"))
    files = [path.stat().st_size for path in Path("large").glob("*.safetensors")]
    grown = growth(lambda: AutoModelForCausalLM.from_pretrained("large"))
    beyond = {name: count - model for name, count in grown.items()}
    print(json.dumps({"model": model, "packed": sum(files), "file": max(files), "beyond": beyond}))


if __name__ == "__main__":
    main()
