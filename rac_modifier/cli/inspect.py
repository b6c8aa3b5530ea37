"""`rac inspect`: what a checkpoint holds, and how it would be served on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rac_modifier.cli.options import AsJson, print_json
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.checkpoint.inspect import CheckpointReport, ModuleRow
    from rac_modifier.kernels.plan import PlanRow

_COLUMNS = (
    "module",
    "shape",
    "dtype",
    "stored",
    "pattern",
    "sparsity",
    "bytes/weight",
    "bytes",
    "note",
)
_WIDTH = 100_000  # of the table in characters at most: more than any needs
_NUMBERS = ("sparsity", "bytes/weight", "bytes")


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a checkpoint, sparse or not")],
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds, and whether serving it on this machine will be faster: if not, why not.

    Example: rac inspect packed-model
    """
    from rac_modifier.checkpoint.inspect import inspect_checkpoint
    from rac_modifier.checkpoint.output_folder import folder_problem
    from rac_modifier.cli.models import resolve
    from rac_modifier.kernels.plan import plan_checkpoint, plan_dense_codes, render_plan

    checkpoint = Path(resolve(str(checkpoint)))
    if problem := folder_problem(checkpoint):
        raise RacError(
            f"{checkpoint}: {problem}; give the folder of a saved model (hf download ID "
            "--local-dir FOLDER makes one)"
        )
    report = inspect_checkpoint(checkpoint)
    if as_json:
        rows = plan_checkpoint(checkpoint) if report.sound else []
        print_json(figures(report, rows))
        if not report.sound:
            raise typer.Exit(1)
        return
    typer.echo(render_report(report))
    if not report.sound:  # nothing of it is planned: its numbers may be anything
        raise RacError(f"{checkpoint}: not sound, see the notes of the table; copy it again")
    rows = plan_checkpoint(checkpoint)
    if rows:
        typer.echo(
            f"\nServed with vLLM on this machine's CPU:\n{render_plan(rows)}\n{speed_line(report, rows)}"
        )
    elif dense := plan_dense_codes(checkpoint):
        few = {row.layer.word_bits for row in dense if row.layer and row.layer.word_bits < 4}
        support = "runs the int4 weights on kernels of its own"
        if few:
            support = (
                f"has no kernel for int{' and int'.join(map(str, sorted(few)))} weights on a CPU"
            )
        typer.echo(
            f"\nvLLM {support}. With --quantization rac, on this machine's CPU:\n{render_plan(dense)}"
        )


def render_report(report: CheckpointReport) -> str:
    """Return a table with a row per matrix, and the totals; lines are not broken."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _NUMBERS else "left", no_wrap=True)
    for row in report.modules:
        table.add_row(*(Text(printable(cell)) for cell in _cells(row)))
    console = Console(file=StringIO(), width=_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return "\n".join([f"{report.folder}: {report.format}", *lines, *map(printable, totals(report))])


def printable(text: str) -> str:
    """Return `text` with its control characters escaped: a terminal would obey them."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def figures(report: CheckpointReport, rows: Sequence[PlanRow]) -> dict[str, Any]:
    """Return what is printed as values for JSON; `served`: the plan of each linear module."""
    from dataclasses import asdict

    computed = ("stored_bytes", "dense_bytes", "sparsity", "sound")
    return {
        **asdict(report),
        **{name: getattr(report, name) for name in computed},
        "served": [
            {"module": row.module, **asdict(row.decision), "ceiling": row.decision.ceiling}
            for row in rows
        ],
    }


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


def totals(report: CheckpointReport) -> list[str]:
    """Return the lines below the table."""
    dense = (
        f" stored, {report.dense_bytes:,} with every matrix dense"
        if report.dense_bytes != report.stored_bytes
        else ""
    )
    lines = [f"all tensors: {report.stored_bytes:,} bytes{dense}"]
    lines += [f"quantized weights: {scheme.describe()}" for scheme in report.quantization]
    if report.sparsity is not None:
        lines.append(
            f"{len(report.sparse)} pruned matrices, {report.sparsity:.2%} of their weights are zero"
        )
    else:
        lines.append("no matrix is recorded as pruned")
    if not report.sound:
        lines.append("NOT SOUND: see the notes of the rows above")
    if report.run_record is not None:
        lines.append(_record_line(report.run_record))
    return lines


def speed_line(report: CheckpointReport, rows: Sequence[PlanRow]) -> str:
    """Return the most that decoding can gain: bytes per token with the kernels, and dense.

    The baseline is every matrix dense in the dtype that it would be served in. Matrices without
    a plan (the output matrix, say) are read in both cases as they are stored.
    """
    sparse = [row for row in rows if row.decision.sparse]
    if not sparse:
        return "No module runs on a sparse kernel here, so decoding is as fast as that of the dense model."
    planned = {row.module for row in rows}
    unplanned = [r for r in report.modules if r.read_per_token and r.name not in planned]
    dense = read = float(sum(row.stored_bytes for row in unplanned))
    for row in rows:
        stored = row.rows * row.columns * row.decision.bytes_per_weight
        dense += stored * row.decision.ceiling
        read += stored * (1 if row.decision.sparse else row.decision.ceiling)
    kernels = ", ".join(dict.fromkeys(row.decision.kernel for row in sparse))
    return (
        f"Decoding reads {read / 1e6:,.1f} MB of weights per token with the {kernels}, and "
        f"{dense / 1e6:,.1f} MB with every matrix dense in the dtype that is served: at most "
        f"{dense / read:.2f}x as fast as the dense model, at batch size 1."
    )


def _record_line(record: dict[str, Any]) -> str:
    if "packing" in record:
        return (
            f"packed by rac pack from {record.get('base_model', '?')}, which was pruned elsewhere"
        )
    calibration = record.get("calibration")
    counts = (
        ", ".join(f"{key} {value}" for key, value in calibration.items())
        if isinstance(calibration, dict)
        else "?"
    )
    return f"run record: {record.get('method', '?')} on {record.get('base_model', '?')}; calibration: {counts}"
