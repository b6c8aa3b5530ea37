"""Pruning time, error and peak memory: ours against llm-compressor's SparseGPTModifier on the same batches.

    python benchmarks/pruning_time.py                   # the embedded reasoner, then two layers of Qwen2-1.5B shape
    python benchmarks/pruning_time.py --case reasoner
    python benchmarks/pruning_time.py --case qwen2-7b-1-layer --tokens 131072
    python benchmarks/pruning_time.py --who paper "paper + refit" quality    # any of VARIANTS in common.py
    python benchmarks/pruning_time.py --rounds 0 --free 16    # each once in its own process, as if 16 GiB were free

`ours` is SparseGPT as upstream's, in our order (group by group); the presets can be compared with each other as well.
All go through upstream's `oneshot` on a fresh copy of the same model, in one process, in turn; the time is that of the
whole call. The batches hold no padding, which upstream would count. The error compares the last hidden state with the
dense model's on the calibration batches. Peak memory comes from one further process for each, over its size before the call;
with `--rounds 0` time and error come from that process, too.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import VARIANTS, fresh, machine
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import rac_modifier
from rac_modifier.calibration.calibration_set import CalibrationSet
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.calibration.mixture import CalibrationSequence, compose
from rac_modifier.llmcompressor import forecast
from rac_modifier.settings.calibration import CalibrationSettings

BATCH_TOKENS = 4096


def reasoner_case(tokens: int) -> tuple[Any, list[CalibrationSequence]]:
    """The embedded reasoner on its own traces, joined and cut into rows of 256 so that no row needs padding."""
    from rac_modifier.calibration.calibration_set import build_calibration_set
    from rac_modifier.settings.traces import TraceSettings

    model = fresh(rac_modifier.reasoner_path())
    tokenizer = AutoTokenizer.from_pretrained(rac_modifier.reasoner_path())
    store = Path(tempfile.gettempdir()) / "rac-benchmark-traces.jsonl"
    traces = TraceSettings(store=str(store), sampling={"max_new_tokens": 512, "batch_size": 128})
    loader = build_calibration_set(
        model, tokenizer, traces, CalibrationSettings(tokens=tokens, held_out_tokens=0)
    ).loader
    ids = [i for s in loader.sequences for i in s.ids]
    return model, [
        CalibrationSequence(tuple(ids[at : at + 256]), 0, "traces")
        for at in range(0, len(ids) - 255, 256)
    ]


QWEN_1_5B = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
QWEN_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
}
HALF_OF_7B = {
    "hidden_size": 1792,
    "intermediate_size": 9472,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


def qwen_case(
    shape: dict[str, int], layers: int, tokens: int
) -> tuple[Any, list[CalibrationSequence]]:
    """Decoder layers of a Qwen2 shape with random weights, and random tokens in rows of 512."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096, num_hidden_layers=layers, max_position_embeddings=4096, **shape
    )
    model = Qwen2ForCausalLM(config)
    folder = Path(tempfile.mkdtemp())
    config.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    model.name_or_path = str(folder)
    ids = torch.randint(0, 4096, (tokens // 512, 512)).tolist()
    return model, [CalibrationSequence(tuple(row), 0, "traces") for row in ids]


WHO: dict[str, dict[str, Any] | None] = {
    "upstream": None,
    "ours": VARIANTS["paper + group order"],
    **VARIANTS,
}
CASES: dict[str, tuple[Callable[[int], tuple[Any, list[CalibrationSequence]]], int]] = {
    "reasoner": (reasoner_case, 32768),
    "qwen2-1.5b-2-layers": (partial(qwen_case, QWEN_1_5B, 2), 16384),
    "qwen2-7b-1-layer": (partial(qwen_case, QWEN_7B, 1), 16384),
    "qwen2-7b-half": (partial(qwen_case, HALF_OF_7B, 1), 8192),  # an eighth of the products
}


class Peer:
    """Prunes fresh copies of the case's model, with so many calibration tokens (None: the case's own)."""

    def __init__(self, case: str, pattern: str, tokens: int | None):
        build, usual = CASES[case]
        self.model, sequences = build(tokens or usual)
        self.settings = {"sparsity": 0.5, "mask_structure": pattern}
        self.calibration = CalibrationSet(
            CalibrationLoader(
                sequences, compose(sequences), CalibrationSettings(batch_tokens=BATCH_TOKENS), 0
            )
        )
        self.dense = self.hidden(self.model)

    def hidden(self, model: Any) -> torch.Tensor:
        """Last hidden states of up to four batches."""
        with torch.no_grad():
            batches = [
                b["input_ids"] for b, _ in zip(self.calibration.loader, range(4), strict=False)
            ]
            return torch.cat(
                [
                    model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
                    for ids in batches
                ]
            )

    def prune(self, who: str) -> tuple[float, Any]:
        model = copy.deepcopy(self.model)
        started, cpu = time.perf_counter(), time.process_time()
        if WHO[who] is not None:
            structured = self.settings["mask_structure"] != "0:0"
            pattern = {k: v for k, v in self.settings.items() if k != "sparsity" or not structured}
            recipe = rac_modifier.ReasoningAwareSparseGPTModifier(**pattern, **WHO[who])
            recipe.use_calibration_set(self.calibration)
            oneshot(model=model, recipe=recipe)
        else:
            recipe = SparseGPTModifier(
                **self.settings, ignore=["re:.*lm_head"], block_size=128, dampening_frac=0.01
            )
            plain = torch.utils.data.DataLoader(
                [dict(b) for b in self.calibration.loader], batch_size=None
            )
            oneshot(model=model, recipe=recipe, dataset=plain)
        self.cpu_seconds = time.process_time() - cpu
        return time.perf_counter() - started, model

    def error(self, model: Any) -> float:
        return float((self.hidden(model) - self.dense).square().sum() / self.dense.square().sum())


def compare(
    case: str,
    pattern: str,
    tokens: int | None,
    rounds: int,
    who: list[str],
    with_memory: bool,
    free: float | None,
) -> dict[str, Any]:
    peer = Peer(case, pattern, tokens)
    seconds: dict[str, list[float]] = {name: [] for name in who}
    errors: dict[str, float] = {}
    for index in range(rounds):
        for name in who if index % 2 == 0 else who[::-1]:
            took, model = peer.prune(name)
            seconds[name].append(took)
            errors[name] = peer.error(model)
            print(
                f"{case} {pattern} round {index + 1}: {name} {took:.2f} s, {peer.cpu_seconds:.2f} s of CPU, error "
                f"{errors[name]:.5f}",
                flush=True,
            )
            del model
    alone = {
        name: by_itself(case, pattern, tokens, free, name) if with_memory else {} for name in who
    }
    memory = {name: alone[name].get("mib", float("nan")) for name in who}
    for name in who if not rounds else ():
        seconds[name], errors[name] = [alone[name]["seconds"]], alone[name]["error"]
        print(
            f"{case} {pattern}: {name} {seconds[name][0]:.2f} s, {alone[name]['cpu']:.2f} s of CPU",
            flush=True,
        )
    for name in who:
        ratios = [s / first for s, first in zip(seconds[name], seconds[who[0]], strict=True)]
        print(
            f"| {case} | {pattern if pattern != '0:0' else '50 %'} | {name} | {statistics.median(seconds[name]):.2f} s | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {errors[name]:.5f} | "
            f"{memory[name]:.0f} MiB |",
            flush=True,
        )
    return {
        "case": case,
        "pattern": pattern,
        "tokens": tokens,
        "seconds": seconds,
        "errors": errors,
        "peak_mib": memory,
    }


def by_itself(
    case: str, pattern: str, tokens: int | None, free: float | None, who: str
) -> dict[str, float]:
    """One run in a process of its own: MiB that the call adds to its peak, seconds, those of the processor, error."""
    command = [sys.executable, __file__, "--case", case, "--pattern", pattern, "--memory-of", who]
    command += ["--tokens", str(tokens)] if tokens else []
    command += ["--free", str(free)] if free else []
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def resident(field: str) -> float:
    """This process's memory now (VmRSS) or at its peak (VmHWM), in MiB."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--pattern", choices=("2:4", "0:0"), action="append")
    parser.add_argument(
        "--who",
        choices=WHO,
        nargs="+",
        default=["upstream", "ours"],
        help="the first is what the ratios are to",
    )
    parser.add_argument(
        "--tokens", type=int, default=None, help="calibration tokens; each case has its own default"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="0: each once, in a process of its own"
    )
    parser.add_argument(
        "--free",
        type=float,
        help="GiB that are taken to be free; where activations do not fit, some are computed twice",
    )
    parser.add_argument(
        "--without-memory", action="store_true", help="leave out the runs that measure peak memory"
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--memory-of", choices=WHO, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.free:
        forecast.free_bytes = lambda device: int(args.free * 2**30)  # type: ignore[attr-defined]
    if args.without_memory and not args.rounds:
        parser.error(
            "--rounds 0 measures in the processes that --without-memory leaves out: give one of both"
        )
    if args.memory_of:
        peer = Peer(args.case[0], args.pattern[0], args.tokens)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
        before = resident("VmRSS")
        took, model = peer.prune(args.memory_of)
        found = {"mib": resident("VmHWM") - before, "seconds": took, "cpu": peer.cpu_seconds}
        print(json.dumps({**found, "error": peer.error(model)}))
        return
    print(machine())
    print(
        f"| case | sparsity | who | time, median of {args.rounds or 1} | ratio | error | peak memory over the start |"
    )
    results = [
        compare(
            case, pattern, args.tokens, args.rounds, args.who, not args.without_memory, args.free
        )
        for case in args.case or list(CASES)[:2]
        for pattern in args.pattern or ("2:4", "0:0")
    ]
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
