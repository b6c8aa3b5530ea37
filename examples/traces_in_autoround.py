"""AutoRound's own API, calibrated on the model's own traces.

    python examples/traces_in_autoround.py [MODEL [OUTPUT [STORE]]]  # default: the reasoner

Rows of one length: AutoRound counts padding in its loss, and leaves out rows that are
shorter than `seqlen`.
"""

from __future__ import annotations

import sys

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

import rac_modifier

LENGTH = 512


def main(
    model: str = "",
    output: str = "autoround",
    store: str = "traces.jsonl",
    tokens: int = 32_768,
    iters: int = 200,
) -> None:
    """Sample traces, or go on with the store, and quantize to int4."""
    model = model or str(rac_modifier.reasoner_path())
    rows = rac_modifier.trace_dataset(
        model, tokens=tokens, store=store, sampling={"max_new_tokens": 512}, length=LENGTH
    )
    print(f"{len(rows)} rows of {LENGTH} tokens")
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"),
        AutoTokenizer.from_pretrained(model),
        scheme="W4A16",
        dataset=[torch.tensor([row["input_ids"]]) for row in rows],
        seqlen=LENGTH,
        nsamples=len(rows),
        iters=iters,
    )
    rounding.quantize_and_save(output, format="auto_round")
    print(f"saved {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
