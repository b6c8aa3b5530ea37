"""llm-compressor's own GPTQ, calibrated on the model's own traces.

    python examples/traces_in_llmcompressor.py [MODEL [OUTPUT [STORE]]]  # default: the reasoner

The rows are packed to one length, so that llm-compressor neither cuts nor pads them.
"""

from __future__ import annotations

import sys

from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier

import rac_modifier

LENGTH = 512


def main(
    model: str = "", output: str = "gptq", store: str = "traces.jsonl", tokens: int = 32_768
) -> None:
    """Sample traces, or go on with the store, and quantize to int4."""
    model = model or str(rac_modifier.reasoner_path())
    rows = rac_modifier.trace_dataset(
        model, tokens=tokens, store=store, sampling={"max_new_tokens": 512}, length=LENGTH
    )
    print(f"{len(rows)} rows of {LENGTH} tokens")
    oneshot(
        model=model,
        dataset=rows.remove_columns("loss_mask"),
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        max_seq_length=LENGTH,
        num_calibration_samples=len(rows),
        output_dir=output,
    )
    print(f"saved {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
