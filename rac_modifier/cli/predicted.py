"""What `rac inspect --device` prints: the predicted times of a checkpoint's layers on a GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rac_modifier.kernels.predicted import Prediction

NOT_MEASURED = "predicted, nothing was measured on a GPU"
_HEAD = ("layer", "count", "shape", "runs", "us", "bound by", "over bf16", "over fp8", "over int4")
_DENSE = ("bf16", "fp8", "int4")


def render_prediction(prediction: Prediction) -> str:
    """A table with a row per kind of layer and one for the step, and the lines about it."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for layer in prediction.layers:
        gains = tuple(f"{layer.dense[name] / layer.time.total:.2f}x" for name in _DENSE)
        shape = f"{layer.rows}x{layer.columns}"
        rows.append(
            (layer.kind, str(layer.count), shape, layer.kernel, f"{layer.time.total:.1f}", layer.time.bound, *gains)
        )
    if prediction.here:
        gains = tuple(f"{prediction.dense(name) / prediction.here:.2f}x" for name in _DENSE)
        rows.append(
            ("all", str(sum(layer.count for layer in prediction.layers)), "", "", f"{prediction.here:.1f}", "", *gains)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    many = "1 token" if prediction.tokens == 1 else f"{prediction.tokens} tokens"
    head = f"On one {prediction.card.title}, a step of {many}, RAC_GPU_KERNELS=on, bfloat16: {NOT_MEASURED}"
    return "\n".join([head, *table, *_notes(prediction)])


def prediction_figures(prediction: Prediction) -> dict[str, Any]:
    """What is printed, as values for JSON; times in microseconds."""
    rows = [
        asdict(layer) | {"us": layer.time.total, "bound": layer.time.bound, "dense_us": dict(layer.dense)}
        for layer in prediction.layers
    ]
    for row in rows:
        row["resources_us"] = row.pop("time")
        del row["dense"]
    return {
        "note": NOT_MEASURED,
        "card": asdict(prediction.card),
        "tokens": prediction.tokens,
        "layers": rows,
        "us": prediction.here,
        "dense_us": {name: prediction.dense(name) for name in _DENSE},
        "left_out": dict(prediction.left_out),
    }


def _notes(prediction: Prediction) -> list[str]:
    notes = [
        "over bf16, fp8, int4: times of vLLM's dense kernels (cuBLAS, CUTLASS, Marlin class) over those here; predicted too"
    ]
    for reason in dict.fromkeys(layer.reason for layer in prediction.layers if layer.reason is not None):
        named = ", ".join(dict.fromkeys(layer.kind for layer in prediction.layers if layer.reason == reason))
        notes.append(f"{named}: {reason}")
    if not any(layer.reason is None for layer in prediction.layers):
        notes.append(
            "no layer runs on a GPU kernel; they take packed sparse weights in bfloat16, int8, fp8 (e4m3) and int4"
        )
    notes += [f"{count} modules are left out: {reason}" for reason, count in prediction.left_out.items()]
    if prediction.in_cache:
        notes.append(f"L2 of the {prediction.card.title} holds all of these weights, so the times are too long")
    notes.append("attention, norms, sampling and the server are not in it; docs/results/gpu.md has the formula")
    return notes
