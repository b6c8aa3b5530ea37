"""TRL's SFTTrainer on the model's own traces; the loss counts completions alone.

    python examples/traces_in_trl.py [MODEL [OUTPUT [STORE]]]     # by default the embedded reasoner

`rac_modifier.fixed_mask(model)` around `train()` keeps the zeros of a pruned model.
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import rac_modifier


def main(
    model: str = "",
    output: str = "sft",
    store: str = "traces.jsonl",
    tokens: int = 32_768,
    steps: int = 20,
) -> float:
    """Train for a few steps; return the mean loss."""
    model = model or str(rac_modifier.reasoner_path())
    rows = rac_modifier.trace_dataset(
        model, tokens=tokens, store=store, sampling={"max_new_tokens": 512}
    )
    rows = rows.rename_column("loss_mask", "completion_mask").remove_columns("attention_mask")
    config = SFTConfig(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=4,
        completion_only_loss=True,
        max_length=None,
        report_to="none",
        bf16=False,
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    loss = trainer.train().training_loss
    trainer.save_model(output)
    print(f"saved {output}; loss {loss:.3f}")
    return loss


if __name__ == "__main__":
    main(*sys.argv[1:])
