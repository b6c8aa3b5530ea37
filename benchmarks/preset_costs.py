"""What each preset costs on models of three sizes, counted in multiply-adds: the table in docs/results/pruning_time.md.

    python benchmarks/preset_costs.py

No weights are made or loaded; `rac estimate MODEL --recipe R` prints the same for any model and recipe.
"""

from __future__ import annotations

import argparse

import common  # noqa: F401 - quiet logs
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor.targets import find_targets
from rac_modifier.pruning.cost import groups_by_input
from rac_modifier.settings.pattern import Pattern

SHAPES = {  # of DeepSeek-R1-Distill-Qwen: hidden, MLP, layers, heads, key-value heads
    "1.5B": (1536, 8960, 28, 12, 2),
    "7B": (3584, 18944, 28, 28, 4),
    "32B": (5120, 27648, 64, 40, 8),
}
PRESETS = ("quality", "fast", "paper")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000_000, 131_072, 16_384])
    args = parser.parse_args()
    print(
        "| shape | tokens | preset | multiply-adds | to paper | a billion weights | forward passes | second moments | solver |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (hidden, mlp, layers, heads, kv_heads) in SHAPES.items():
        config = Qwen2Config(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=False,
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        groups = groups_by_input(model, find_targets(model, ["Linear"], [], Pattern.unstructured(0.5)))
        weights = sum(group.weights for group in groups)
        for tokens in args.tokens:
            costs = {
                preset: ReasoningAwareSparseGPTModifier(
                    sparsity=0.5, preset=preset, calibration={"tokens": tokens, "held_out_tokens": 0}
                ).cost(groups)
                for preset in PRESETS
            }
            for preset, cost in costs.items():
                shares = " | ".join(f"{x / cost.total:.0%}" for x in (cost.forward, cost.second_moments, cost.solver))
                print(
                    f"| {name} | {tokens:,} | {preset} | {cost.total:.2e} | {cost.total / costs['paper'].total:.2f} | "
                    f"{cost.total / weights * 1e9:.2e} | {shares} |"
                )


if __name__ == "__main__":
    main()
