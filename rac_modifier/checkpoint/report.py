"""The text of a checkpoint report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rac_modifier.checkpoint.inspect import CheckpointReport, ModuleRow

_HEAD = ("module", "shape", "dtype", "stored", "pattern", "sparsity", "bytes/weight", "bytes", "note")


def render(report: CheckpointReport) -> str:
    """A plain text table, a row a matrix, with totals and the ceiling of the gain."""
    table = [_HEAD, *(_cells(row) for row in report.modules)]
    widths = [max(len(line[column]) for line in table) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join([f"{report.folder}: {report.format}", "", *lines, "", *_totals(report)])


def _cells(row: ModuleRow) -> tuple[str, ...]:
    ok = {True: " ok", False: " BROKEN", None: ""}[row.pattern_ok]
    return (
        row.name,
        f"{row.rows}x{row.columns}" if row.rows else "?",
        row.dtype,
        row.stored,
        f"{row.structure}{ok}" if row.structure else "-",
        "-" if row.sparsity is None else f"{row.sparsity:.4f}",
        f"{row.bytes_per_weight:.4f}" if row.rows * row.columns else "-",
        f"{row.stored_bytes:,}",
        f"DAMAGED: {row.problem}" if row.problem else row.reason or "",
    )


def _totals(report: CheckpointReport) -> list[str]:
    lines = [f"all tensors: {report.stored_bytes:,} bytes stored, {report.dense_bytes:,} with every matrix dense"]
    lines += [f"quantized weights: {scheme.describe()}" for scheme in report.quantization]
    if report.sparsity is not None:
        lines.append(f"{len(report.sparse)} pruned matrices, {report.sparsity:.2%} of their weights are zero")
    else:
        lines.append("no matrix is recorded as pruned")
    whole, part = report.ceiling(), report.ceiling(only_sparse=True)
    if whole is not None:
        lines.append(
            f"ceiling of decoding speed against dense bf16, from bytes alone: {whole:.2f}x over all matrices of a step"
            + (f", {part:.2f}x over the pruned ones" if part is not None else "")
        )
    if not report.sound:
        lines.append("NOT SOUND: see the notes of the rows above")
    if report.run_record is not None:
        lines.append(_record_line(report.run_record))
    return lines


def _record_line(record: dict[str, Any]) -> str:
    calibration = record.get("calibration")
    counts = ", ".join(f"{key} {value}" for key, value in calibration.items()) if isinstance(calibration, dict) else "?"
    return f"run record: {record.get('method', '?')} on {record.get('base_model', '?')}; calibration: {counts}"
