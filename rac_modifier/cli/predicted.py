"""What `rac inspect --device` prints: the predicted times of a checkpoint's layers on a GPU."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rac_modifier.kernels.predicted import Measured, Prediction

NOT_MEASURED = "predicted, nothing was measured on a GPU"
_HEAD = ("layer", "count", "shape", "runs", "us", "bound by", "over bf16", "over fp8", "over int4")
_MEASURED, _NONE = "measured us", "-"
_DENSE = ("bf16", "fp8", "int4")


def render_prediction(prediction: Prediction, measured: Measured | None = None) -> str:
    """A table with a row per kind of layer and one for the step, and the lines about it; measured times are a column of it.

    Raises:
        RacError: `measured` is of another card, or has none of these layers.
    """
    from rac_modifier.kernels.predicted import measured_times

    rows: list[tuple[str, ...]] = [_HEAD]
    for layer in prediction.layers:
        gains = tuple(f"{layer.dense[name] / layer.time.total:.2f}x" for name in _DENSE)
        shape = f"{layer.rows}x{layer.columns}"
        rows.append(
            (
                layer.kind,
                str(layer.count),
                shape,
                layer.kernel,
                f"{layer.time.total:.1f}",
                layer.time.bound,
                *gains,
            )
        )
    if prediction.here:
        gains = tuple(f"{prediction.dense(name) / prediction.here:.2f}x" for name in _DENSE)
        rows.append(
            (
                "all",
                str(sum(layer.count for layer in prediction.layers)),
                "",
                "",
                f"{prediction.here:.1f}",
                "",
                *gains,
            )
        )
    said, notes = NOT_MEASURED, _notes(prediction)
    if measured is not None:
        found = measured_times(prediction, measured)
        rows = [
            (*row[:5], cell, *row[5:])
            for row, cell in zip(rows, _cells(prediction, found), strict=True)
        ]
        said = f"us: predicted; {_MEASURED}: {measured.source}, by make gpu-check"
        notes.insert(0, _counted(found.count(None)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    many = "1 token" if prediction.tokens == 1 else f"{prediction.tokens} tokens"
    head = f"On one {prediction.card.title}, a step of {many}, RAC_GPU_KERNELS=on, bfloat16: {said}"
    return "\n".join([head, *table, *notes])


def prediction_figures(prediction: Prediction, measured: Measured | None = None) -> dict[str, Any]:
    """What is printed, as values for JSON; times in microseconds, None where nothing was measured.

    Raises:
        RacError: `measured` is of another card, or has none of these layers.
    """
    from rac_modifier.kernels.predicted import measured_times

    rows = [
        asdict(layer)
        | {"us": layer.time.total, "bound": layer.time.bound, "dense_us": dict(layer.dense)}
        for layer in prediction.layers
    ]
    for row in rows:
        row["resources_us"] = row.pop("time")
        del row["dense"]
    if measured is not None:
        for row, us in zip(rows, measured_times(prediction, measured), strict=True):
            row["measured_us"] = us
    note = (
        NOT_MEASURED
        if measured is None
        else f"predicted; measured_us by make gpu-check, {measured.source}"
    )
    return {
        "note": note,
        "card": asdict(prediction.card),
        "tokens": prediction.tokens,
        "layers": rows,
        "us": prediction.here,
        "dense_us": {name: prediction.dense(name) for name in _DENSE},
        "left_out": dict(prediction.left_out),
    }


def _cells(prediction: Prediction, found: list[float | None]) -> list[str]:
    """The column of measured times: its head, a cell per row, and the step, where all of it was measured."""
    cells = [_NONE if us is None else f"{us:.1f}" for us in found]
    step = [
        us * layer.count
        for us, layer in zip(found, prediction.layers, strict=True)
        if us is not None
    ]
    return [_MEASURED, *cells, f"{sum(step):.1f}" if len(step) == len(found) else _NONE]


def _counted(missing: int) -> str:
    if not missing:
        return f"{_MEASURED}: of all rows"
    rows = "1 row has" if missing == 1 else f"{missing} rows have"
    return f"{_MEASURED}: {rows} none ({_NONE}), for its shape, kernel or number of tokens; the check times layers of an 8B model"


def _notes(prediction: Prediction) -> list[str]:
    notes = [
        "over bf16, fp8, int4: times of vLLM's dense kernels (cuBLAS, CUTLASS, Marlin class) over those here; predicted too"
    ]
    for reason in dict.fromkeys(
        layer.reason for layer in prediction.layers if layer.reason is not None
    ):
        named = ", ".join(
            dict.fromkeys(layer.kind for layer in prediction.layers if layer.reason == reason)
        )
        notes.append(f"{named}: {reason}")
    if not any(layer.reason is None for layer in prediction.layers):
        notes.append(
            "no layer runs on a GPU kernel; they take packed sparse weights in bfloat16, int8, fp8 (e4m3) and int4"
        )
    notes += [
        f"{count} modules are left out: {reason}" for reason, count in prediction.left_out.items()
    ]
    if prediction.in_cache:
        notes.append(
            f"L2 of the {prediction.card.title} holds all of these weights, so the times are too long"
        )
    notes.append(
        "attention, norms, sampling and the server are not in it; docs/results/gpu.md has the formula"
    )
    return notes
