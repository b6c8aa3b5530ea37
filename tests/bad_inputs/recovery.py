"""Mistakes about recovery."""

from __future__ import annotations

import fcntl

from tests.bad_inputs.bench import Bench, Cases
from tests.tiny import linears, save_tiny

CASES = Cases()


@CASES.case(
    "`rac recover --set` of a setting that does not exist",
    "--set: tokns: there is no such setting (value 5); did you mean tokens?",
)
def _(b: Bench) -> None:
    b.rac("recover", b.folder, b.folder, b.tmp / "out", "--set", "tokns=5")


@CASES.case(
    "two runs that recover one model in one folder",
    "is in use by another process (pid 1), which recovers the same",
)
def _(b: Bench) -> None:
    folder = b.tmp / "recovery"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        lock.write("1")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        b.prune_with(recover={"tokens": 200, "held_out_tokens": 64, "folder": str(folder)})


@CASES.case(
    "`rac recover` with the sparse model in the place of the dense one",
    "the first model has to be the dense one",
)
def _(b: Bench) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_tiny(b.tmp / "sparse")
    model = AutoModelForCausalLM.from_pretrained(folder)
    for linear in linears(model).values():
        linear.weight.data[:, ::2] = 0.0
    model.save_pretrained(folder)
    b.rac("recover", folder, b.folder, b.tmp / "out")


@CASES.case(
    "LoRA adapters with dropout on a sparse model, in `fixed_mask`",
    "lora_dropout cannot be masked; set lora_dropout=0.0",
)
def _(b: Bench) -> None:
    from peft import LoraConfig, get_peft_model

    from rac_modifier.recovery.fixed_mask import fixed_mask
    from tests.recovery.recovery_helpers import dense_and_sparse

    with fixed_mask(
        get_peft_model(
            dense_and_sparse()[1], LoraConfig(target_modules=["q_proj"], lora_dropout=0.1)
        )
    ):
        pass
