"""What the benchmarks share: quiet logs, fresh models, and recipes of the calibrations compared."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
from loguru import logger
from transformers import AutoModelForCausalLM

import rac_modifier

logger.remove()
logger.add(sys.stderr, level="WARNING", filter="rac_modifier")

# One share of the token budget each; "RAC" is prompt + trace sequences as in the paper.
CALIBRATIONS = {"generic text": "generic", "prompts only": "prompts", "RAC": "traces"}

# The presets, and what each of their parts does alone.
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "paper + group order": {"preset": "paper", "order": "auto"},
    "paper + refit": {"preset": "paper", "refit": True},
    "paper + dense target": {"preset": "paper", "order": "auto", "reconstruct": "dense"},
    "fast": {"preset": "fast"},
    "paper + alps": {"preset": "paper", "solver": "alps"},
    "quality": {"preset": "quality"},
    "quality + int4": {"preset": "quality", "quantization": {"scheme": "W4A16"}},
    "quality, 8 iterations": {"preset": "quality", "iterations": 8, "refit_steps": 6},
    "quality + recovery": {"preset": "quality", "recover": {"tokens": 80_000}},
}


def fresh(path: str | Path) -> Any:
    """The model in float32: the same function as in bfloat16 storage, and faster on a CPU without bf16 units."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def modifier(
    pattern: str | float,
    calibration: str,
    *,
    tokens: int,
    seed: int,
    store: Path,
    variant: str = "paper",
) -> Any:
    """Our modifier for one cell of a comparison; `pattern` is "N:M" or a sparsity."""
    part = CALIBRATIONS[calibration]
    return rac_modifier.ReasoningAwareSparseGPTModifier(
        **({"mask_structure": pattern} if isinstance(pattern, str) else {"sparsity": pattern}),
        **VARIANTS[variant],
        traces=trace_settings(part, store, max_new_tokens=512, batch_size=128, seed=seed),
        calibration={
            "tokens": tokens,
            "mixture": {part: 1.0},
            "seed": seed,
            # what is measured here is measured by the benchmark itself
            **({"held_out_tokens": 0} if part == "traces" else {}),
        },
    )


def trace_settings(part: str, store: Path, *, seed: int, **completions: int) -> dict[str, Any]:
    """The settings of `traces` that have an effect on this part of a mixture."""
    if part == "traces":
        return {"store": str(store), "sampling": {**completions, "seed": seed}}
    return {"sampling": {"seed": seed}} if part == "prompts" else {}


def machine() -> str:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        flags = next(
            line for line in info.read_text().splitlines() if line.startswith("flags")
        ).split()
        cpu = lines[0].split(":")[1].strip()
        cpu += f" ({', '.join(f for f in ('avx2', 'avx512f', 'amx_bf16') if f in flags)})"
    return (
        f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"load average {os.getloadavg()[0]:.1f} at the start"
    )
