"""Packed experts against vLLM's dense experts on a CPU: milliseconds per layer, as Markdown. In the serving environment.

    .venv-serve/bin/python benchmarks/experts.py             # the shape of Qwen3-30B-A3B, 64 of its 128 experts
    .venv-serve/bin/python benchmarks/experts.py --hidden 4096 --width 1536 --experts 16 --sparsity 0.6

Both get the same weights, tokens and routing, one step each in turn, medians. Tokens choose their experts at random, so that many
tokens need all experts. The weights of all experts are larger than caches. bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

from rac_modifier.checkpoint.round_to_nearest import quantize_groups, quantize_rows
from rac_modifier.checkpoint.stored_weight import StoredWeight, from_dense
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu.support import support
from rac_modifier.vllm_plugin.experts import PackedExperts

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def pruned(rows: int, columns: int, sparsity: float) -> Tensor:
    """A random weight in bfloat16 with this share of zeros, anywhere."""
    kept = torch.rand(rows, columns) >= sparsity
    return torch.where(kept, torch.randn(rows, columns) / columns**0.5, 0.0).bfloat16()


def stored(weight: Tensor, bits: int) -> StoredWeight:
    """The weight as a checkpoint stores it: in bfloat16, int8 (a scale per row) or int4 (groups of 128)."""
    if bits == 16:
        return from_dense(weight, "weight")
    values, scale = quantize_rows(weight) if bits == 8 else quantize_groups(weight, 128)
    return replace(from_dense(values, "weight"), scale=scale, bits=bits)


def vllm_dense(up: Tensor, down: Tensor) -> Experts:
    """vLLM's own kernel for unquantized experts on this CPU."""
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    up, down = cpu_prepack_moe_weight(up, isa), cpu_prepack_moe_weight(down, isa)

    def run(x: Tensor, shares: Tensor, ids: Tensor) -> Tensor:
        out = torch.empty_like(x)
        cpu_fused_moe(out, x, up, down, None, None, shares, ids, "silu", isa)
        return out

    return run


def measure(
    contenders: dict[str, Experts], given: tuple[Tensor, ...], rounds: int
) -> dict[str, float]:
    """Milliseconds per call, medians over `rounds`, in turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run(*given)
            if number:  # the first call of each is a warm-up
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--bits", type=int, nargs="+", choices=[16, 8, 4], default=[16, 8, 4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"{support().isa}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    ups = [pruned(2 * args.width, args.hidden, args.sparsity) for _ in range(args.experts)]
    downs = [pruned(args.hidden, args.width, args.sparsity) for _ in range(args.experts)]
    contenders: dict[str, Experts] = {
        "vLLM dense bf16": vllm_dense(torch.stack(ups), torch.stack(downs))
    }
    names = {16: "bf16", 8: "int8", 4: "int4"}
    for bits in args.bits:
        pairs = [
            ((cpu, stored(u, bits)), (cpu, stored(d, bits)))
            for u, d in zip(ups, downs, strict=True)
        ]
        label = f"{args.sparsity:.0%} + {names[bits]}"
        contenders[label] = PackedExperts(label, pairs, torch.nn.functional.silu, torch.bfloat16)  # type: ignore[arg-type]
        held = sum(p.numel() * p.element_size() for p in contenders[label].parameters())  # type: ignore[attr-defined]
        print(
            f"{label}: {held / sum(w.numel() * 2 for w in (*ups, *downs)):.2f} of the dense bytes"
        )
    print(
        "| tokens |"
        + "".join(f" {name} |" for name in contenders)
        + "\n|"
        + "---|" * (1 + len(contenders))
    )
    for tokens in args.tokens:
        ids = torch.rand(tokens, args.experts).topk(args.chosen, dim=1).indices.int()
        given = (
            torch.randn(tokens, args.hidden).bfloat16(),
            torch.rand(tokens, args.chosen).softmax(1),
            ids,
        )
        dense, sparse = (run(*given).float() for run in [*contenders.values()][:2])
        if args.bits[0] == 16 and not torch.allclose(
            dense, sparse, rtol=0.1, atol=0.02 * dense.abs().max().item()
        ):
            raise SystemExit("the two ways give different results")
        found = measure(contenders, given, args.rounds)
        reference = found["vLLM dense bf16"]
        cells = [
            f" {ms:.2f} |" if ms is reference else f" {ms:.2f} ({reference / ms:.2f}x) |"
            for ms in found.values()
        ]
        print(f"| {tokens} |" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
