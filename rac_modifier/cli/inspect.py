"""`rac inspect`: the content of a checkpoint, and how it would run."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from rac_modifier.cli import options
from rac_modifier.cli.models import resolve
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.checkpoint.inspect import CheckpointReport, ModuleRow

_HEAD = ("module", "shape", "dtype", "stored", "pattern", "sparsity", "bytes", "note")


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint, sparse or not: folder or id")],
    as_json: options.AsJson = False,
) -> None:
    """Show the content of a checkpoint, and whether serving it here is faster; if not, why not.

    Example: rac inspect packed-model
    """
    from rac_modifier.checkpoint.output_folder import local_folder

    folder = local_folder(resolve(checkpoint))
    from rac_modifier.checkpoint.formats import FORMATS
    from rac_modifier.kernels.choose import plan_checkpoint, render_plan

    report, rows = plan_checkpoint(folder)
    if as_json:
        computed = {name: getattr(report, name) for name in ("dense_bytes", "sparsity", "sound")}
        served = [{"module": row.module, **asdict(row.decision)} for row in rows]
        options.print_json({**asdict(report), **computed, "served": served})
    else:
        typer.echo(render_report(report))
    if not report.sound:
        raise RacError(f"{folder}: not sound, see the notes of its matrices; copy it again")
    if rows and not as_json:
        option = " (with --quantization rac if another tool saved it)"
        option = "" if report.format in FORMATS else option
        typer.echo(f"\nServed with vLLM on this machine's CPU{option}:\n{render_plan(rows)}")


def render_report(report: "CheckpointReport") -> str:
    """Return a table with a row per matrix, and the _totals; lines are not broken."""
    table = options.render_table(_HEAD, [_cells(row) for row in report.modules], text_columns=5)
    return "\n".join(
        [f"{report.folder}: {report.format}", table, *map(options.printable, _totals(report))]
    )


def _cells(row: "ModuleRow") -> tuple[str, ...]:
    return (
        row.name,
        f"{row.rows}x{row.columns}" if row.rows else "?",
        row.dtype,
        row.stored,
        row.structure or "-",
        "-" if row.sparsity is None else f"{row.sparsity:.4f}",
        f"{row.stored_bytes:,}",
        f"DAMAGED: {row.problem}" if row.problem else row.reason or "",
    )


def _totals(report: "CheckpointReport") -> list[str]:
    """Return the lines below the table."""
    stored, dense = report.stored_bytes, report.dense_bytes
    lines = [f"all tensors: {stored:,} bytes, {dense:,} with every matrix dense"]
    lines += [f"quantized weights: {scheme.describe()}" for scheme in report.quantization]
    if report.sparsity is None:
        lines.append("no matrix is recorded as pruned")
    else:
        lines.append(
            f"{len(report.sparse)} pruned matrices, {report.sparsity:.2%} of their weights are zero"
        )
        if report.format == "dense":
            lines.append("they are stored dense: rac pack makes them smaller")
    return lines
