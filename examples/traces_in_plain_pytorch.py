"""A PyTorch loop over the model's traces: the `forward_loop` of NVIDIA ModelOpt and others.

    python examples/traces_in_plain_pytorch.py [MODEL [STORE]]    # default: the embedded reasoner

With ModelOpt: `mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, forward_loop=forward_loop)`. Here
the maximum over the inputs of each linear layer is taken, as calibrators do.
"""

from __future__ import annotations

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import rac_modifier

LENGTH = 512


def main(model: str = "", store: str = "traces.jsonl", tokens: int = 32_768) -> dict[str, float]:
    """Return the largest absolute input of each linear layer."""
    source = model or str(rac_modifier.reasoner_path())
    rows = rac_modifier.trace_dataset(
        source, tokens=tokens, store=store, sampling={"max_new_tokens": 512}, length=LENGTH
    ).with_format("torch")

    @torch.no_grad()
    def forward_loop(model: torch.nn.Module) -> None:
        for batch in DataLoader(rows, batch_size=4):
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    loaded = AutoModelForCausalLM.from_pretrained(source, dtype="auto").eval()
    largest: dict[str, float] = {}
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear):

            def observe(_, inputs, name=name):
                largest[name] = max(largest.get(name, 0.0), float(inputs[0].abs().max()))

            module.register_forward_pre_hook(observe)
    forward_loop(loaded)
    print(
        f"{len(rows)} rows of {LENGTH} tokens through {len(largest)} linear layers; "
        f"largest input {max(largest.values()):.1f}"
    )
    return largest


if __name__ == "__main__":
    main(*sys.argv[1:])
