"""Memory that a run is predicted to need, beside what its process grows by: the table in docs/results/scale.md.

    OMP_NUM_THREADS=1 python benchmarks/memory.py                   # minutes of a core, 4 GB
    OMP_NUM_THREADS=1 python benchmarks/memory.py --cases "1.5B, 1 layer" --presets paper quality --free 2

Each row is a run of `oneshot` in a process of its own, with random weights in float32 and 2:4: decoder layers of the shapes of
Qwen2.5-0.5B and Qwen2-1.5B, and of OLMoE-1B-7B with 4 of its 64 experts (expert_time.py), attention left dense.
Predicted is what the memory check says right before pruning begins; the peak is that of the process from there on (VmHWM), and so
are the seconds of the processor, and the pages that the process was given, which includes those that it had given back.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch
from common import VARIANTS, machine
from expert_time import ROW, Measured, faults, layer
from llmcompressor import oneshot
from pruning_time import QWEN_1_5B, qwen_case, resident

import rac_modifier
from rac_modifier.calibration.calibration_set import CalibrationSet
from rac_modifier.calibration.loader import CalibrationLoader
from rac_modifier.calibration.mixture import CalibrationSequence, compose
from rac_modifier.llmcompressor import memory_check
from rac_modifier.settings.calibration import CalibrationSettings

QWEN_0_5B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


def experts_case(tokens: int) -> tuple[Any, list[CalibrationSequence]]:
    """Two layers of experts, and random tokens."""
    model = layer(4, layers=2)
    rows = torch.randint(0, 4096, (tokens // ROW, ROW)).tolist()
    return model, [CalibrationSequence(tuple(row), 0, "traces") for row in rows]


# the model, tokens, tokens of a batch, and what is left dense
CASES: dict[str, tuple[Any, int, int, list[str]]] = {
    "0.5B, 2 layers": (partial(qwen_case, QWEN_0_5B, 2), 8192, 4096, []),
    "1.5B, 1 layer": (partial(qwen_case, QWEN_1_5B, 1), 16384, 4096, []),
    "experts, 2 layers": (experts_case, 4096, 2048, ["re:.*self_attn.*"]),
}
PRESETS: dict[str, dict[str, Any]] = {
    **{
        name: {"mask_structure": "2:4", **VARIANTS[name]}
        for name in ("paper", "paper + group order", "quality", "quality + int4")
    },
    "dense + int4": {"solver": "none", "quantization": {"scheme": "W4A16"}},
}


def run(case: str, preset: str) -> dict[str, float]:
    """Prune in this process; bytes."""
    build, tokens, batch_tokens, dense = CASES[case]
    model, sequences = build(tokens)
    measured = Measured()
    settings = CalibrationSettings(batch_tokens=batch_tokens)
    recipe = rac_modifier.ReasoningAwareSparseGPTModifier(
        ignore=["re:.*lm_head", *dense],
        calibration={"tokens": tokens, "batch_tokens": batch_tokens, "held_out_tokens": 0},
        **PRESETS[preset],
    )
    recipe.use_calibration_set(
        CalibrationSet(CalibrationLoader(sequences, compose(sequences), settings, 0))
    )
    oneshot(model=model.eval(), recipe=recipe)
    return {
        "predicted": measured.predicted,
        "peak": (resident("VmHWM") - measured.before) * 2**20,
        "seconds": time.process_time() - measured.started,
        "pages": (faults() - measured.faults) * resource.getpagesize(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument(
        "--free",
        type=float,
        help="GiB that are taken to be free; where activations do not fit, some are computed twice",
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.free:
        memory_check.free_bytes = lambda device: int(args.free * 2**30)  # type: ignore[attr-defined]
    if args.one:
        print(json.dumps(run(*args.one)))
        return
    print(
        f"{machine()}\n\n| case | preset | predicted | peak of the process | predicted / peak | processor | pages |\n"
        "|---|---|---|---|---|---|---|"
    )
    for case in args.cases:
        for preset in args.presets:
            command = [sys.executable, __file__, "--one", case, preset]
            command += ["--free", str(args.free)] if args.free else []
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout.strip().splitlines()[-1])
            cells = (f"{found[name] / 2**20:,.0f} MiB" for name in ("predicted", "peak"))
            ratio = found["predicted"] / found["peak"]
            cost = f"{found['seconds']:.1f} s | {found['pages'] / 2**20:,.0f} MiB"
            print(f"| {case} | {preset} | {' | '.join(cells)} | {ratio:.2f} | {cost} |", flush=True)


if __name__ == "__main__":
    main()
