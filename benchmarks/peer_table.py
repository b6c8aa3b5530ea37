"""The rows and the table of peers.py, with what the formats cost in accuracy."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peer_contenders import IN_PYTHON, LINEARS, LLAMA, SERVED, Figures


def kl_of(name: str, measured: dict[str, float]) -> float | None:
    """KL to the dense model of the contender's format, nats per token; None where it was not measured."""
    if name in LLAMA:
        return measured.get(LLAMA[name])
    bits, pruned, _ = {**LINEARS, **SERVED, **IN_PYTHON}.get(name, (0, 0.0, 0))
    if pruned:
        return measured.get(f"{100 * pruned:.0f} % + int{bits}")
    return {16: 0.0, 4: measured.get("int4"), 3: measured.get("int3")}.get(
        bits
    )  # W8A8 rounds activations too, OpenVINO in its own way


def read_accuracy(paths: list[Path]) -> dict[str, float]:
    """By label, the KL of rows of `rac frontier` or of gguf_accuracy.py."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return {row["label"]: row["divergence"]["kl"] for row in rows if row.get("divergence")}


def median(values: list[float | None]) -> float | None:
    return (
        statistics.median(v for v in values if v is not None)
        if any(v is not None for v in values)
        else None
    )


def row(
    name: str, by_round: Mapping[int, Figures], measured: dict[str, float], failed: str | None
) -> dict[str, Any]:
    """The medians of a contender's runs, every run, and the KL of its format if that was `measured`.

    `failed`: why rounds are missing; a contender that never ran has figures of None.
    """
    runs = list(by_round.values())
    return {
        "name": name,
        "weight_bytes": runs[0].weight_bytes if runs else None,
        "first_token_s": median([r.first_token_s for r in runs]),
        "ms_per_token": median([r.ms_per_token for r in runs]),
        "tokens_per_s": median([r.tokens_per_s for r in runs]),
        "kl": kl_of(name, measured),
        "runs": [{"round": number, **asdict(of)} for number, of in by_round.items()],
        "failed": failed,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown; ratios to llama.cpp Q4_0, of the time per token and of tokens per second, from within each round.

    Below it, why a contender did not run, or not in every round.
    """
    base = next((r for r in rows if r["name"] == "llama.cpp Q4_0"), None)
    of_base = {run["round"]: run for run in base["runs"]} if base else {}
    head = "| contender | weights GB | GB/s | of probe | first token s | ms per token | tokens/s "
    lines = [head + "| Q4_0's time over its own | in all | KL |"]
    lines.append("|" + "---|" * 10)
    for r in rows:
        if not r["runs"]:
            lines.append(f"| {r['name']} |" + " - |" * 9)
            continue
        gigabytes = r["weight_bytes"] / 1e9
        speed = gigabytes / r["ms_per_token"] * 1e3
        probe = median([run["gigabytes_per_s"] for run in r["runs"]])
        runs = [(run, of_base[run["round"]]) for run in r["runs"] if run["round"] in of_base]
        ratios = [b["ms_per_token"] / a["ms_per_token"] for a, b in runs]
        in_all = [
            a["tokens_per_s"] / b["tokens_per_s"]
            for a, b in runs
            if a["tokens_per_s"] and b["tokens_per_s"]
        ]
        cells = [
            r["name"],
            f"{gigabytes:.3f}",
            f"{speed:.1f}",
            "-" if probe is None else f"{speed / probe:.0%}",
        ]
        for value, digits in (
            (r["first_token_s"], 2),
            (r["ms_per_token"], 1),
            (r["tokens_per_s"], 1),
        ):
            cells.append("-" if value is None else f"{value:.{digits}f}")
        for of in (ratios, in_all):
            cells.append(
                f"{statistics.median(of):.2f}x ({min(of):.2f}-{max(of):.2f})" if of else "-"
            )
        cells.append("-" if r["kl"] is None else f"{r['kl']:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    missing = [f"- {r['name']}: {r['failed']}" for r in rows if r["failed"]]
    return "\n".join([*lines, *(["", *missing] if missing else [])])
