"""`rac activations`: which layers of a quantized checkpoint lose nothing with activations in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rac_modifier.cli.models import check_model, load_on_accelerator, own_samples, resolve
from rac_modifier.cli.options import (
    AsJson,
    BatchSize,
    Cap,
    Column,
    Dtype,
    Precision,
    Seed,
    Sequences,
    Source,
    print_json,
)


def activations(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="of a packed int8 or int4 checkpoint, or of a dense W4A16 one"
        ),
    ],
    limit: Annotated[
        float,
        typer.Option(
            min=0, help="the most that 8 bits may add, as a share of the layer's own error"
        ),
    ] = 0.01,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="the model that was quantized, to measure own errors; default: those of rac_run.json",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="only measure and print, write nothing")
    ] = False,
    sequences: Sequences = 64,
    source: Source = "arithmetic",
    column: Column = None,
    cap: Cap = 256,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    precision: Precision = Dtype.FLOAT32,
    as_json: AsJson = False,
) -> None:
    """Find the layers that lose nothing with activations in 8 bits in place of 16, and write them into config.json.

    vllm serve then multiplies those layers in half of the instructions, which pays from some requests at once on.

    Example: rac activations reasoner-2of4-int8

    Example: rac activations Qwen3-1.7B-W4A16 --dense Qwen/Qwen3-1.7B
    """
    from rac_modifier.checkpoint.measured import record_activations
    from rac_modifier.checkpoint.record import RUN_RECORD_NAME
    from rac_modifier.cli.tables import render_results
    from rac_modifier.evaluation.activation_bits import (
        activation_table,
        check_original,
        choose_activations,
    )
    from rac_modifier.evaluation.activation_layers import quantized_layers
    from rac_modifier.problems.held_out import held_out_problems

    found = quantized_layers(folder, recorded=dense is None)
    original = None
    if dense is not None:
        check_model(resolve(dense))
    model, tokenizer = load_on_accelerator(str(folder), precision)
    if dense is not None:
        original, _ = load_on_accelerator(dense, precision)
        check_original(model, original, found.layers)
    problems = held_out_problems(source, sequences, seed, column, None)
    samples = own_samples(str(folder), model, tokenizer, problems, cap, batch_size, seed)
    choice = choose_activations(model, found.layers, samples, limit, original)
    entry = {**choice.as_dict(source), "left_out": found.count_left_out()}
    if not check:
        record_activations(folder, choice.modules, entry)
    if as_json:
        print_json({**entry, "written": not check})
        return
    typer.echo(render_results(activation_table(choice.errors, limit)))
    for line in (*found.describe_left_out(), choice.describe()):
        typer.echo(line)
    if check:
        typer.echo("nothing was written (--check)")
        return
    kept = (folder / RUN_RECORD_NAME).is_file()
    typer.echo(
        f"written into config.json of {folder}"
        + ("" if kept else f"; it has no {RUN_RECORD_NAME}, so these figures are kept nowhere")
    )
