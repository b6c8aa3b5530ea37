"""`rac inspect`: the content of a checkpoint, how it would run, the bits of activations."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rac_modifier.cli import options
from rac_modifier.cli.models import check_model, load_on_accelerator, resolve
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.checkpoint.inspect import CheckpointReport, ModuleRow

_HEAD = ("module", "shape", "dtype", "stored", "pattern", "sparsity", "bytes", "note")
_SAMPLES, _CAP = 64, 256  # own answers on which activations are measured, and tokens of each


def inspect(
    context: typer.Context,
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint, sparse or not: folder or id")],
    activations: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="LIMIT",
            help="instead: record in config.json the layers of int8 or int4 where activations of "
            "8 bits add at most this share of the layer's own error, such as 0.01; 0 takes the "
            "record out",
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="with --activations: the model that was quantized, to measure own errors; "
            "default: the errors in rac_run.json",
        ),
    ] = None,
    source: options.Source = "arithmetic",
    column: options.Column = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the content of a checkpoint, and whether serving it here is faster; if not, why not.

    Example: rac inspect packed-model

    Example: rac inspect Qwen3-1.7B-W4A16 --activations 0.1 --dense Qwen/Qwen3-1.7B
    """
    from rac_modifier.checkpoint.formats import FORMATS
    from rac_modifier.checkpoint.output_folder import local_folder
    from rac_modifier.kernels.choose import plan_checkpoint, render_plan

    for name in ("dense", "source", "column"):
        given = context.get_parameter_source(name)
        if activations is None and given is not None and given.name != "DEFAULT":
            raise RacError(f"--{name} needs --activations LIMIT; add it, or leave --{name} out")
    folder = local_folder(resolve(checkpoint))
    if activations is not None:
        _choose_activations(folder, activations, dense, source, column, as_json)
        return
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


def _choose_activations(
    folder: Path, limit: float, dense: str | None, source: str, column: str | None, as_json: bool
) -> None:
    """Measure layers with 8-bit activations on the model's answers; record the choice."""
    from rac_modifier.checkpoint.card import record_activations
    from rac_modifier.evaluation.activations import (
        activations_table,
        check_original,
        choose_activations,
        layers_of,
    )
    from rac_modifier.evaluation.calibrated_prompt import choose_prompt, recorded_prompts
    from rac_modifier.measure.teacher_forcing import sample_sequences
    from rac_modifier.problems.held_out import held_out_problems
    from rac_modifier.settings.sampling import SamplingSettings

    layers = layers_of(folder, recorded=dense is None)
    original = None
    if dense is not None:
        check_model(resolve(dense))
    model, tokenizer = load_on_accelerator(str(folder), "float32")
    if dense is not None:
        original, _ = load_on_accelerator(dense, "float32")
        check_original(model, original, layers)
    problems = held_out_problems(source, _SAMPLES, column=column)
    prompt, _ = choose_prompt({str(folder): recorded_prompts(str(folder))})
    sampling = SamplingSettings(max_new_tokens=_CAP, **prompt.model_dump())
    samples = sample_sequences(model, tokenizer, problems, sampling)
    entry = {"source": source, **choose_activations(model, layers, samples, limit, original)}
    chosen = [name for name, row in entry["layers"].items() if row["bits"] == 8]
    record_activations(folder, chosen, entry)
    if as_json:
        options.print_json(entry)
        return
    typer.echo(options.render_results(activations_table(entry)))
    typer.echo(f"written into config.json of {folder}")


def render_report(report: "CheckpointReport") -> str:
    """Return a table with a row per matrix, and the totals; lines are not broken."""
    table = options.render_table(_HEAD, [_cells(row) for row in report.modules], text_columns=5)
    return "\n".join(
        [f"{report.folder}: {report.format}", table, *map(options.printable, totals(report))]
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


def totals(report: "CheckpointReport") -> list[str]:
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
