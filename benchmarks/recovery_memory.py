"""Memory that recovery is predicted to need, beside what its process grows by: the table in docs/results/recovery.md.

    OMP_NUM_THREADS=1 python benchmarks/recovery_memory.py                         # minutes of a core, 4 GB
    OMP_NUM_THREADS=1 python benchmarks/recovery_memory.py --cases "SmolLM2-135M"

Models are the embedded reasoner in float32, and with random weights in bfloat16 SmolLM2-135M's shape and four layers of the shape
of Qwen2.5-0.5B, whose vocabulary has 151,936 words; 60 % of the weights are made zero. Traces are random tokens. Each row is
recovery in a process of its own: the dense model's states, training, and a state written after each step. Predicted is what the
memory check says for these traces before it begins; the peak is what the process grows by from there on (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import fresh, machine
from pruning_time import resident
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import rac_modifier
from rac_modifier.freed_memory import keep_freed_memory
from rac_modifier.pruning.linalg import bf16_is_fast
from rac_modifier.recovery.distill import recover
from rac_modifier.recovery.memory import RecoveryNeed, largest_batches
from rac_modifier.recovery.teacher import StoredTeacher
from rac_modifier.settings.recovery import RecoverySettings

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
)  # fmt: skip
QWEN = Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=4, num_attention_heads=14,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
MODELS: dict[str, Any] = {
    "reasoner": lambda: fresh(rac_modifier.reasoner_path()),
    "SmolLM2-135M": lambda: LlamaForCausalLM(SMOLLM2).to(torch.bfloat16),
    "Qwen2.5-0.5B, 4 layers": lambda: Qwen2ForCausalLM(QWEN).to(torch.bfloat16),
}
# the model, lengths of the traces, settings; a second step is the largest, since moments are there from then on
CASES: dict[str, tuple[str, list[int], dict[str, Any]]] = {
    "reasoner": ("reasoner", [170] * 48, {}),
    "SmolLM2-135M": ("SmolLM2-135M", [520, 300, 450], {"step_tokens": 512}),
    "SmolLM2-135M, steps of 2,048": ("SmolLM2-135M", [500] * 8, {}),
    "SmolLM2-135M, checkpointing": ("SmolLM2-135M", [500] * 8, {"activation_checkpointing": True}),
    "Qwen2.5-0.5B, 4 layers": ("Qwen2.5-0.5B, 4 layers", [700, 400, 500], {"step_tokens": 640}),
}


def traces(model: Any, lengths: list[int], seed: int = 0) -> list[tuple[list[int], int]]:
    """Random tokens, of which the first 60 are the prompt."""
    generator = torch.Generator().manual_seed(seed)
    words = model.config.vocab_size
    return [
        (torch.randint(0, words, (length,), generator=generator).tolist(), 60) for length in lengths
    ]


@torch.no_grad()
def prune(model: Any) -> None:
    """Zeros at random in 60 % of each linear layer."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not model.get_output_embeddings():
            layer.weight.masked_fill_(torch.rand(layer.weight.shape) < 0.6, 0.0)


def memory_of(case: str) -> dict[str, float]:
    """Recover in this process; bytes."""
    keep_freed_memory()
    torch.manual_seed(0)
    name, lengths, options = CASES[case]
    model, settings = MODELS[name]().eval(), RecoverySettings(**options)
    device, training, held_out = (
        torch.device("cpu"),
        traces(model, lengths),
        traces(model, [300, 310], seed=1),
    )
    need = RecoveryNeed.of(
        model, settings, largest_batches(training, settings, device, 1), device
    )  # counted before the peak starts anew, as in a run
    Path("/proc/self/clear_refs").write_text("5")  # Linux
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        teacher = StoredTeacher.write(
            model, [*held_out, *training], Path(folder) / "teacher", key=case
        )
        prune(model)
        recover(
            model, teacher, training, held_out, settings, state=Path(folder), save_seconds=0.0,
            autocast=torch.bfloat16 if bf16_is_fast(device) else None, progress=False,
        )  # fmt: skip
    return {
        "predicted": need.device + need.host,
        "step": need.step or 0,
        "peak": (resident("VmHWM") - before) * 2**20,
    }


def memory_table(cases: list[str]) -> None:
    print(
        "| case | predicted | of it a step | peak of the process | predicted / peak |\n|---|---|---|---|---|"
    )
    for case in cases:
        done = subprocess.run(
            [sys.executable, __file__, "--one", case], check=True, capture_output=True, text=True
        )
        found = json.loads(done.stdout.strip().splitlines()[-1])
        cells = " | ".join(
            f"{found[name] / 2**20:,.0f} MiB" for name in ("predicted", "step", "peak")
        )
        print(f"| {case} | {cells} | {found['predicted'] / found['peak']:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(memory_of(args.one)))
        return
    print(f"{machine()}\n")
    memory_table(args.cases)


if __name__ == "__main__":
    main()
