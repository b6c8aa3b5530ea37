"""What llama.cpp's rounding costs a model: KL of Q4_0, Q4_1, Q5_0 and Q8_0 on the problems of a frontier, beside its rows.

    pip install gguf
    python benchmarks/gguf_accuracy.py smollm2 frontier     # a model and the folder of `rac frontier`, which has its answers
    python benchmarks/gguf_accuracy.py smollm2 frontier --out gguf.jsonl    # for `peers.py --accuracy`

The linear layers are rounded by the reference code of the `gguf` package and multiplied in float32, so that this is the error of
the weights alone: llama.cpp also rounds activations to 8 bits. Embeddings and head stay as they are, as in our checkpoints.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import torch
from common import fresh, machine
from frontier_answers import answers_in
from gguf.quants import dequantize, quantize
from transformers import AutoTokenizer

from rac_modifier.evaluation.divergence import divergence
from rac_modifier.frontier.folder import FrontierFolder


@torch.no_grad()
def rounded(model: torch.nn.Module, name: str) -> float:
    """Round the linear layers of the decoder in place; returns their bits per weight."""
    kind = gguf.GGMLQuantizationType[name]
    for label, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and label != "lm_head":
            weight = module.weight.numpy()
            module.weight.copy_(torch.from_numpy(dequantize(quantize(weight, kind), kind)))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return 8 * size / block


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("frontier", type=Path)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q5_0", "Q4_1", "Q4_0"])
    parser.add_argument("--out", type=Path, help="a line of JSON per type is added there")
    args = parser.parse_args()
    print(machine())
    folder, dense = FrontierFolder.read(args.frontier), fresh(args.model)
    sequences = answers_in(folder, AutoTokenizer.from_pretrained(args.model))
    print("| rounding | bits per weight | KL | top-1 |\n|---|---|---|---|")
    for name in args.types:
        model = fresh(args.model)
        bits = rounded(model, name)
        found = divergence(dense, model, sequences, label=name, progress=False)
        print(
            f"| {name} | {bits:.2f} | {found.kl:.4f} ± {found.kl_stderr:.4f} | {found.agreement:.1%} |",
            flush=True,
        )
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps({"label": name, "divergence": found.as_dict()}) + "\n")


if __name__ == "__main__":
    main()
