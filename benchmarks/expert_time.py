"""Pruning one layer of routed experts: time, memory and tokens per expert. The tables in docs/results/experts.md.

    OMP_NUM_THREADS=1 python benchmarks/expert_time.py                # a minute of a core per preset, 3 GB
    OMP_NUM_THREADS=1 python benchmarks/expert_time.py --presets quality --experts 4 --tokens 2048
    OMP_NUM_THREADS=1 python benchmarks/expert_time.py --primitives   # what solving experts at once gains on this CPU
    python benchmarks/expert_time.py --launches                       # and on a GPU: counted, not measured

The shape is that of OLMoE-1B-7B (hidden 2048, 64 experts of width 1024, 8 per token, 16 layers; 1.3B of 6.9B parameters are
active), the published mixture that is nearest to 1.5B active. One layer of it with random weights, as Qwen3-MoE, and --experts of
its experts: an eighth of the tokens is routed to each, as in the whole. Attention is left dense. Each preset runs in a process of
its own, through `oneshot`. Seconds are those of the processor, in all threads, so they can be read on a shared machine too.
Memory is the peak of the process from where pruning begins, over what it has there, as the memory check predicts it.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import VARIANTS, machine
from expert_launches import HIDDEN, WIDTH, launches_table, problem
from llmcompressor import oneshot
from pruning_time import resident
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import rac_modifier
from rac_modifier.calibration.calibration_set import CalibrationSet
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.calibration.mixture import CalibrationSequence, compose
from rac_modifier.llmcompressor import memory_check, pruning_modifier
from rac_modifier.pruning.hessian import Statistics
from rac_modifier.pruning.solve import solve_many
from rac_modifier.pruning.topk import ranks_in_groups
from rac_modifier.settings.calibration import CalibrationSettings

EXPERTS, CHOSEN, LAYERS = 64, 8, 16
ROW, BATCH_TOKENS = 512, 2048
PRESETS = ("paper", "paper + group order", "quality", "quality + int4")


def layer(experts: int, layers: int = 1) -> Any:
    """A layer, or several, of so many experts; each gets the share of the tokens that it would get of all of them."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=HIDDEN, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=16,
        head_dim=128, moe_intermediate_size=WIDTH, num_experts=experts, num_experts_per_tok=max(experts * CHOSEN // EXPERTS, 1),
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    folder = tempfile.mkdtemp()
    config.save_pretrained(folder)
    model.config._name_or_path = model.name_or_path = folder
    return model


def faults() -> int:
    """Pages that this process was given so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Measured:
    """Seconds in statistics and solver, and memory from the last memory check on; in place while `oneshot` runs."""

    def __init__(self) -> None:
        self.seconds = {"statistics": 0.0, "solving": 0.0}
        self.predicted = 0
        self.before = 0.0
        self._check = memory_check.check_memory
        pruning_modifier.check_memory = self._begin  # type: ignore[attr-defined]
        Statistics.add = self._timed("statistics", Statistics.add)  # type: ignore[method-assign]
        pruning_modifier.solve_groups = self._timed("solving", pruning_modifier.solve_groups)  # type: ignore[attr-defined]

    def _begin(
        self, need: Any, groups: Any, onload: torch.device, offload: torch.device, **options: Any
    ) -> Any:
        need = self._check(need, groups, onload, offload, **options)
        self.predicted = max(need.bytes_on(onload, onload, offload, group) for group in groups)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
        self.before = resident("VmRSS")
        self.started, self.faults = time.process_time(), faults()
        return need

    def _timed(self, part: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            began = time.process_time()
            try:
                return inner(*args, **options)
            finally:
                self.seconds[part] += time.process_time() - began

        return timed


def run(preset: str, experts: int, tokens: int) -> dict[str, Any]:
    """Prune a layer in this process."""
    model, measured = layer(experts), Measured()
    rows = torch.randint(0, 4096, (max(tokens // ROW, 1), ROW)).tolist()
    sequences = [CalibrationSequence(tuple(row), 0, "traces") for row in rows]
    loader = CalibrationLoader(
        sequences, compose(sequences), CalibrationSettings(batch_tokens=BATCH_TOKENS), 0
    )
    recipe = rac_modifier.ReasoningAwareSparseGPTModifier(
        mask_structure="2:4",
        ignore=["re:.*lm_head", "re:.*self_attn.*"],
        calibration={"tokens": tokens, "batch_tokens": BATCH_TOKENS, "held_out_tokens": 0},
        **VARIANTS[preset],
    )
    recipe.use_calibration_set(CalibrationSet(loader))
    oneshot(model=model, recipe=recipe)
    whole = time.process_time() - measured.started
    modules = recipe._results
    routed = {name.rpartition(".")[0]: row["tokens"] for name, row in modules.items()}
    return {
        **measured.seconds,
        "forward": whole - sum(measured.seconds.values()),
        "tokens": sorted(routed.values()),
        "error": statistics.mean(row["relative_error"] for row in modules.values()),
        "peak": (resident("VmHWM") - measured.before) * 2**20,
        "predicted": measured.predicted,
    }


def in_process(preset: str, args: argparse.Namespace) -> dict[str, Any]:
    """The same in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--one",
        preset,
        "--experts",
        str(args.experts),
        "--tokens",
        str(args.tokens),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def time_table(args: argparse.Namespace) -> None:
    """What was measured for each preset, and an estimate for all layers and experts from it."""
    print(f"{machine()}; {args.experts} of {EXPERTS} experts, {args.tokens:,} tokens\n")
    print(
        "| preset | tokens per expert | forward and rest | statistics | solving | solving, per expert | peak | predicted |"
    )
    print("|" + "---|" * 8)
    for preset in args.presets:
        found = in_process(preset, args)
        least, median, most = (
            found["tokens"][0],
            statistics.median(found["tokens"]),
            found["tokens"][-1],
        )
        print(
            f"| {preset} | {least:,}, {median:,.0f}, {most:,} | {found['forward']:.1f} s | {found['statistics']:.1f} s | "
            f"{found['solving']:.1f} s | {found['solving'] / args.experts:.2f} s | {found['peak'] / 2**20:,.0f} MiB | "
            f"{found['predicted'] / 2**20:,.0f} MiB ({found['predicted'] / found['peak']:.2f}) |",
            flush=True,
        )
        solved = LAYERS * EXPERTS * found["solving"] / args.experts
        per_token = (
            LAYERS
            * (EXPERTS / args.experts)
            * (found["forward"] + found["statistics"])
            / args.tokens
        )
        print(
            f"{preset}: estimated for {LAYERS} layers of {EXPERTS} experts on this core: {solved / 3600:.1f} h of solving, and "
            f"{per_token * 1000:.0f} ms per token of forward passes and statistics",
            file=sys.stderr,
        )


def seconds_of(run: Callable[[], Any], rounds: int) -> float:
    """Of the processor, the median of some rounds after a first one."""
    taken = []
    for _ in range(rounds + 1):
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    return statistics.median(taken[1:])


def admm(z: Tensor, kept: Tensor, target: Tensor, inverse: Tensor, buffer: Tensor) -> None:
    """The operations of an iteration of ALPS, of one problem or of several; for their time alone."""
    pull = (
        torch.mul(kept, 2, out=buffer)
        .sub_(z)
        .sub_(target)
        .mul_(inverse.diagonal(dim1=-2, dim2=-1)[..., None])
    )
    z.sub_(kept, alpha=1.5).add_(target, alpha=1.5)
    z.add_(inverse @ pull.bfloat16())
    scores = torch.abs(z, out=buffer)
    ranks = ranks_in_groups(scores.view(-1, scores.shape[-1]), 4).view(z.shape)
    torch.mul(z, ranks.ge_(2), out=kept)


def primitives_table() -> None:
    """Experts at once against one after the other: the parts of ALPS, and all of SparseGPT."""
    print(
        f"{machine()}\n\n| inputs, outputs, experts | Cholesky | product, bf16 | iteration of ALPS | SparseGPT |\n"
        + "|---" * 5
        + "|"
    )
    for columns, rows, count, rounds in ((64, 128, 16, 5), (256, 512, 16, 2), (768, 2048, 4, 1)):
        problems = [problem(columns, rows, seed, False) for seed in range(count)]
        hessians, w = (
            torch.stack([p.hessian for p in problems]),
            torch.stack([p.weights[0].T for p in problems]),
        )
        rounded, low = hessians.bfloat16(), w.bfloat16()
        states = [w.clone() for _ in range(3)]
        every: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
            "Cholesky": (
                lambda hessians=hessians: torch.linalg.cholesky_ex(hessians),
                lambda hessians=hessians: [torch.linalg.cholesky_ex(h) for h in hessians],
            ),
            "product": (
                lambda rounded=rounded, low=low: rounded @ low,
                lambda rounded=rounded, low=low: [a @ b for a, b in zip(rounded, low, strict=True)],
            ),
            "iteration": (
                lambda s=states, w=w, a=rounded: admm(s[0], s[1], w, a, s[2]),
                lambda s=states, w=w, a=rounded: [
                    admm(*each) for each in zip(s[0], s[1], w, a, s[2], strict=True)
                ],
            ),
            "SparseGPT": (
                lambda problems=problems: solve_many("sparsegpt", problems),
                lambda problems=problems: [solve_many("sparsegpt", [each]) for each in problems],
            ),
        }
        cells = []
        for together, alone in every.values():
            at_once, in_turn = seconds_of(together, rounds), seconds_of(alone, rounds)
            cells.append(
                f"{in_turn * 1000:.1f} -> {at_once * 1000:.1f} ms ({in_turn / at_once:.2f}x)"
            )
        print(f"| {columns}, {rows}, {count} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", choices=VARIANTS, default=PRESETS)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--primitives", action="store_true")
    parser.add_argument("--launches", action="store_true")
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.one, args.experts, args.tokens)))
    elif args.primitives:
        primitives_table()
    elif args.launches:
        launches_table()
    else:
        time_table(args)


if __name__ == "__main__":
    main()
