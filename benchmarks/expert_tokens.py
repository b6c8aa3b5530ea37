"""Which tokens experts should be calibrated on: the table in docs/results/experts.md.

    python benchmarks/expert_tokens.py                     # on one core: some minutes to make the model, then seconds per row
    python benchmarks/expert_tokens.py --tokens 4096 8192 --patterns 0.5 2:4

The model is a small Qwen3-MoE that is made here: the embedded reasoner, whose MLPs become 16 experts (each a random half of the
neurons), two of them per token, trained on the reasoner's problems until the router has learned to use them. It and its traces stay
in --out. Each row prunes it through `oneshot` and has the divergence from the dense model on held-out traces of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import fresh, machine

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import torch
import torch.nn.functional as F
from llmcompressor import oneshot
from seeds import parse_sparsity
from train_reasoner import IGNORED, batches
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import rac_modifier

EXPERTS, CHOSEN = 16, 2
VARIANTS: dict[str, dict[str, Any]] = {
    "layer by layer, all tokens": {"preset": "paper"},
    "all tokens": {"experts": "all"},
    "routed": {"expert_floor": 1},
    **{f"routed, floor {floor}": {"expert_floor": floor} for floor in (128, 256, 512, 1024, 2048)},
}


def upcycled(seed: int) -> Any:
    """The reasoner with experts in place of its MLPs, and a router that knows nothing yet."""
    torch.manual_seed(seed)
    dense = fresh(rac_modifier.reasoner_path())
    known, width = dense.config.to_dict(), dense.config.intermediate_size
    for name in ("architectures", "model_type", "layer_types", "dtype", "transformers_version"):
        known.pop(name, None)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**known, num_experts=EXPERTS, num_experts_per_tok=CHOSEN, moe_intermediate_size=width // 2,
                       norm_topk_prob=True, router_aux_loss_coef=0.001)
    )  # fmt: skip
    state = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        for ours, theirs in zip(model.model.layers, dense.model.layers, strict=True):
            for number in range(EXPERTS):
                half = torch.randperm(width)[: width // 2]
                gate_up = torch.cat([theirs.mlp.gate_proj.weight[half], theirs.mlp.up_proj.weight[half]])
                ours.mlp.experts.gate_up_proj[number] = gate_up
                ours.mlp.experts.down_proj[number] = 2 * theirs.mlp.down_proj.weight[:, half]
            torch.nn.init.normal_(ours.mlp.gate.weight, std=0.02)
    return model


def trained(folder: Path, steps: int, seed: int) -> Path:
    """The model, trained unless it is there."""
    if (folder / "config.json").exists():
        return folder
    model, tokenizer = upcycled(seed), AutoTokenizer.from_pretrained(rac_modifier.reasoner_path())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    began = time.monotonic()
    for step, ids in zip(range(steps), batches(tokenizer, seed, 0, 2048), strict=False):
        out = model(input_ids=ids.clamp_min(0), output_router_logits=True, use_cache=False)
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=IGNORED)
        (loss + 0.001 * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pruned(model: Path, store: Path, pattern: str | float, tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of one run."""
    modifier = rac_modifier.ReasoningAwareSparseGPTModifier(
        **({"mask_structure": pattern} if isinstance(pattern, str) else {"sparsity": pattern}),
        **settings,
        traces={"store": str(store), "sampling": {"max_new_tokens": 512, "batch_size": 128, "temperature": 0.6}},
        calibration={"tokens": tokens, "batch_tokens": 4096, "held_out_tokens": 8192},
    )
    began = time.monotonic()
    loaded = fresh(model)
    oneshot(model=loaded, recipe=modifier)
    return {
        "seconds": time.monotonic() - began,
        "divergence": modifier._measured,
        "experts": modifier._experts.record().get("experts", {}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/expert_tokens"))
    parser.add_argument("--steps", type=int, default=120, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patterns", nargs="+", type=parse_sparsity, default=["2:4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    model = trained(args.out / "model", args.steps, args.seed)
    print(
        "| pattern | tokens | experts calibrated on | KL, held out | agreement | routed: least, median, most | filled up | s |"
    )
    print("|" + "---|" * 8)
    for pattern in args.patterns:
        for tokens in args.tokens:
            for name in args.variants:
                found = pruned(model, args.out / "traces.jsonl", pattern, tokens, VARIANTS[name])
                kl, layers = found["divergence"], list(found["experts"].get("layers", {}).values())
                routed = [layer["routed"] for layer in layers]
                spread = "-"
                if routed:
                    middle = statistics.median(one["median"] for one in routed)
                    spread = f"{min(one['least'] for one in routed):,}, {middle:,.0f}, {max(one['most'] for one in routed):,}"
                starved = sum(len(layer["starved"]) for layer in layers)
                print(
                    f"| {pattern} | {tokens:,} | {name} | {kl['kl']:.4f} ± {kl['kl_stderr']:.4f} | {kl['agreement']:.1%} | "
                    f"{spread} | {starved} of {sum(layer['experts'] for layer in layers)} | {found['seconds']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
