"""Which tokens the experts of a mixture should be calibrated on: the table in docs/results/experts.md.

    python benchmarks/expert_tokens.py                # minutes to make the model and its traces, then minutes to measure
    python benchmarks/expert_tokens.py --patterns 0.7 --tokens 4096
    python benchmarks/expert_tokens.py --kl           # whole runs of `oneshot`, and their divergence on held-out traces

The model is a small Qwen3-MoE that is made here: the embedded reasoner, whose MLPs become 16 experts (each a random half of the
neurons), two of them per token, trained on the reasoner's problems until the router has learned to use them. It and its traces
stay in --out. Each row prunes the experts of the first and the last layer by one rule, on the first tokens of the traces. The
error is that of the layer's output on other traces: |y - y'|^2 / |y|^2, over all tokens with their routing; and that of
the outputs of starved experts alone, to which fewer than 256 tokens are routed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import fresh, machine
from expert_rules import CHOSEN, EXPERTS, RULES, Rule, Tokens

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import torch
import torch.nn.functional as F
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import linearize_moe
from reasoner_data import IGNORED, batches
from seeds import parse_sparsity
from torch import Tensor
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import rac_modifier
from rac_modifier.llmcompressor.experts import Expert, find_experts
from rac_modifier.pruning.hessian import Hessian
from rac_modifier.pruning.solve import solve
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.traces import TraceSettings
from rac_modifier.traces.collect import collect_traces

HELD_OUT = 8192  # tokens that errors are measured on
STARVED = 256  # routed tokens; as many as an expert has inputs
SAMPLING = {"max_new_tokens": 512, "batch_size": 128, "temperature": 0.6}
RUNS: dict[str, dict[str, Any]] = {
    "all tokens": {"experts": "all"},
    "routed": {"expert_floor": 1},
    "routed, floor 512": {"expert_floor": 512},
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
                gate_up = torch.cat(
                    [theirs.mlp.gate_proj.weight[half], theirs.mlp.up_proj.weight[half]]
                )
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
        loss = F.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=IGNORED
        )
        (loss + 0.001 * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20, (steps - step) / (0.4 * steps))
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(
                f"step {step}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def given_to_experts(
    model: Any, layers: list[int], sequences: list[list[int]]
) -> dict[int, Tokens]:
    """What the experts of these layers are given for the sequences."""
    seen: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in layers}
    hooks = []
    for layer in layers:
        block = model.model.layers[layer].mlp

        def keep(
            module: Any, args: tuple[Tensor, ...], layer: int = layer, gate: Any = block.gate
        ) -> None:
            seen[layer].append((*args, (args[0] @ gate.weight.T).softmax(1)))

        hooks.append(block.experts.register_forward_pre_hook(keep))
    for ids in sequences:
        model.model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {
        layer: Tokens(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        for layer, found in seen.items()
    }


def cut(sequences: list[list[int]], tokens: int) -> list[list[int]]:
    """The first sequences, of `tokens` tokens in all."""
    chosen, left = [], tokens
    for ids in sequences:
        if left <= 0:
            break
        chosen.append(ids[:left])
        left -= len(ids)
    return chosen


@torch.no_grad()
def pruned_outputs(
    expert: Expert, x: Tensor, weights: Tensor, pattern: Pattern, of: Tensor
) -> Tensor:
    """The outputs for inputs `of`, the expert pruned on the inputs `x` with these weights; afterwards it is as before."""
    dense = {module: module.weight.detach().clone() for group in expert.groups for module in group}  # type: ignore[operator]
    x, weights = x[weights > 0], weights[weights > 0]
    for group, read in ((expert.first, lambda: x), (expert.last, lambda: expert.read_by_last(x))):
        hessian = Hessian(group[0].weight.shape[1])  # type: ignore[union-attr]
        hessian.add(read(), weights)
        found = solve("alps", [dense[module] for module in group], hessian.matrix(), pattern)
        for module, solution in zip(group, found, strict=True):
            module.weight.copy_(solution.weight)  # type: ignore[operator]
    outputs: Tensor = expert.module(of)
    for module, weight in dense.items():
        module.weight.copy_(weight)  # type: ignore[operator]
    return outputs


@torch.no_grad()
def layer_error(
    experts: list[Expert], rule: Rule, pattern: Pattern, seen: Tokens, held: Tokens
) -> tuple[float, float]:
    """|y - y'|^2 / |y|^2 of the outputs of a layer on `held`, its experts pruned on `seen` by a rule.

    And the same of the starved experts alone, over their own outputs.
    """
    whole, change = torch.zeros_like(held.x), torch.zeros_like(held.x)
    of_starved = [0.0, 0.0]
    for expert in experts:
        rows = held.routed(expert.number)
        if not bool(rows.any()):
            continue
        share = held.share(expert.number)[rows].unsqueeze(1)
        dense = share * expert.module(held.x[rows])
        pruned = share * pruned_outputs(
            expert, seen.x, rule(seen, expert.number), pattern, held.x[rows]
        )
        whole[rows] += dense
        change[rows] += dense - pruned
        if int(seen.routed(expert.number).sum()) < STARVED:
            of_starved[0] += float((dense - pruned).square().sum())
            of_starved[1] += float(dense.square().sum())
    return float(change.square().sum() / whole.square().sum()), of_starved[0] / max(
        of_starved[1], 1e-30
    )


def sequences_of(folder: Path, model: Path, tokens: int) -> list[list[int]]:
    """The model's own traces with their prompts, sampled unless they are there."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = TraceSettings(store=str(folder / "traces.jsonl"), sampling=SAMPLING)
    store = collect_traces(fresh(model), tokenizer, settings.store, problems=settings.problems,
                           sampling=settings.sampling, tokens=tokens, progress=False)  # fmt: skip
    return [[*trace.prompt_ids, *trace.completion_ids] for trace in store]


def by_layer(args: argparse.Namespace, model_folder: Path) -> None:
    """The table of rules."""
    sequences = sequences_of(args.out, model_folder, max(args.tokens) + HELD_OUT)
    model = linearize_moe(fresh(model_folder).eval())
    names = {m: n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    layers = [0, len(model.model.layers) - 1]
    found = {
        int(routed.name.split(".")[2]): routed.experts for routed in find_experts(model, names)
    }
    every = given_to_experts(model, layers, cut(sequences, max(args.tokens) + HELD_OUT))
    parts = {at: [Tokens(*(t[part] for t in vars(every[at]).values())) for part in (slice(HELD_OUT, None), slice(HELD_OUT))]
             for at in layers}  # fmt: skip
    print(
        "| pattern | tokens | experts calibrated on | first layer | starved | last layer | starved |"
    )
    print("|" + "---|" * 7)
    for pattern in args.patterns:
        parsed = (
            Pattern.parse(pattern, None)
            if isinstance(pattern, str)
            else Pattern.parse("0:0", pattern)
        )
        for tokens in args.tokens:
            seen = {at: Tokens(*(t[:tokens] for t in vars(parts[at][0]).values())) for at in layers}
            counts = {
                at: sorted(int(seen[at].routed(e).sum()) for e in range(EXPERTS)) for at in layers
            }
            print(
                f"routed to an expert, least, median, most: {[(c[0], statistics.median(c), c[-1]) for c in counts.values()]}"
            )
            for name, rule in RULES.items():
                errors = [
                    layer_error(found[at], rule, parsed, seen[at], parts[at][1]) for at in layers
                ]
                print(
                    f"| {pattern} | {tokens:,} | {name} |"
                    + "".join(f" {e:.4f} |" for pair in errors for e in pair),
                    flush=True,
                )


def by_runs(args: argparse.Namespace, model: Path) -> None:
    """Whole runs, and what they record."""
    print("| pattern | tokens | experts calibrated on | KL, held out | agreement | filled up | s |")
    print("|" + "---|" * 7)
    for pattern in args.patterns:
        for tokens in args.tokens:
            for name, settings in RUNS.items():
                modifier = rac_modifier.ReasoningAwareSparseGPTModifier(
                    **(
                        {"mask_structure": pattern}
                        if isinstance(pattern, str)
                        else {"sparsity": pattern}
                    ),
                    **settings,
                    traces={"store": str(args.out / "traces.jsonl"), "sampling": SAMPLING},
                    calibration={
                        "tokens": tokens,
                        "batch_tokens": 4096,
                        "held_out_tokens": HELD_OUT,
                    },
                )
                began = time.monotonic()
                oneshot(model=fresh(model), recipe=modifier)
                kl, layers = (
                    modifier._measured,
                    modifier._experts.record()["experts"]["layers"].values(),
                )
                print(
                    f"| {pattern} | {tokens:,} | {name} | {kl['kl']:.4f} ± {kl['kl_stderr']:.4f} | {kl['agreement']:.1%} | "
                    f"{sum(len(one['starved']) for one in layers)} of {sum(one['experts'] for one in layers)} | "
                    f"{time.monotonic() - began:.0f} |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/expert_tokens"))
    parser.add_argument("--steps", type=int, default=120, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patterns", nargs="+", type=parse_sparsity, default=["2:4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--kl", action="store_true", help="whole runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    model = trained(args.out / "model", args.steps, args.seed)
    (by_runs if args.kl else by_layer)(args, model)


if __name__ == "__main__":
    main()
