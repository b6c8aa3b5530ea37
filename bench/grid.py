"""Rows of recipes run by `rac frontier`, for the suites accuracy, recovery and traces."""

import copy
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bench.common import RAC
from bench.models import Subject

OURS = "ReasoningAwareSparseGPTModifier"
CALIBRATIONS = ("traces", "prompts", "generic")
VARIANTS: dict[str, dict[str, Any]] = {  # settings of the pruning entry
    "paper": {"preset": "paper"},
    "paper + refit": {"preset": "paper", "refit": True},
    "paper + alps": {"preset": "paper", "solver": "alps"},
    "fast": {"preset": "fast"},
    "quality": {"preset": "quality"},
    "quality + int4": {"preset": "quality", "quantization": {"scheme": "W4A16"}},
}
COLUMNS = {
    "row": "",
    "bits per weight": ".2f",
    "KL, nats per token": ".4f",
    "right answers, %": ".1f",
    "truncated answers, %": ".1f",
    "thinking tokens": ".0f",
}


def pattern(text: str) -> dict[str, Any]:
    """Return the setting of a pattern: "2:4", or a share such as "0.6"."""
    return {"mask_structure": text} if ":" in text else {"sparsity": float(text)}


def calibrated_on(kind: str, subject: Subject) -> dict[str, Any]:
    """Return the changed settings that calibrate on traces, prompts or generic text."""
    if kind == "traces":
        return {}
    if kind == "generic":
        return {"traces": None, "calibration.mixture": {"generic": 1.0}}
    mixture = subject.shared.get("calibration", {}).get("mixture", {"traces": 1.0})
    prompts = {part.replace("traces", "prompts"): share for part, share in mixture.items()}
    return {"traces.sampling": None, "calibration.mixture": prompts}


def run_grid(
    subject: Subject,
    rows: Sequence[dict[str, Any]],
    out: Path,
    *,
    tokens: int,
    problems: int | None = None,
    cap: int | None = None,
    temperature: float = 0.0,
    remove_models: bool = True,
) -> list[dict[str, Any]]:
    """Run or resume rows with `rac frontier`; return its finished rows, the dense one first.

    `tokens` are of calibration. `problems`, and `cap`, the most new tokens of an answer or trace,
    replace those of the subject.
    """
    content = copy.deepcopy(
        {"shared": subject.shared, "evaluation": subject.evaluation, "rows": list(rows)}
    )
    shared, evaluation = content["shared"], content["evaluation"]
    shared["calibration"] = {**shared.get("calibration", {}), "tokens": tokens}
    evaluation["temperature"] = temperature
    if problems is not None:
        evaluation["problems"] = problems
    if cap is not None:
        evaluation["cap"] = cap
        shared["traces"]["sampling"]["max_new_tokens"] = cap
    out.mkdir(parents=True, exist_ok=True)
    grid = out / "grid.yaml"
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    command = ["frontier", subject.model, "--recipe-grid", str(grid), "--out", str(out)]
    if remove_models:
        command.append("--remove-models")
    subprocess.run([*RAC, *command], check=True)
    lines = (out / "rows.jsonl").read_text().splitlines()
    measured = {row["label"]: row for row in map(json.loads, lines)}
    labels = {row["label"] for row in rows}
    return [row for row in measured.values() if row["label"] == "dense" or row["row"] in labels]


def cells(row: dict[str, Any]) -> list[Any]:
    """Return the cells of COLUMNS for a finished row."""
    divergence, accuracy = row["divergence"], row["accuracy"]
    return [
        row["label"],
        row["bytes"]["bits_per_weight"],
        divergence and [divergence["kl"], divergence["kl_stderr"] or 0.0],
        accuracy and [100 * accuracy[key] for key in ("accuracy", "ci_low", "ci_high")],
        100 * row["truncated"],
        row["thinking"],
    ]
