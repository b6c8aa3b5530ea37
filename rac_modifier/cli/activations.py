"""`rac activations`: which layers of a quantized checkpoint lose nothing with activations in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rac_modifier.cli.models import check_model, load_on_accelerator, own_samples, resolve
from rac_modifier.cli.options import (
    AsJson,
    Cap,
    Column,
    Dtype,
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
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Find the layers that lose nothing with activations in 8 bits instead of 16, and write them into config.json.

    vllm serve then multiplies these layers in half of the instructions, which pays from a few
    concurrent requests on.

    Example: rac activations reasoner-2of4-int8

    Example: rac activations Qwen3-1.7B-W4A16 --dense Qwen/Qwen3-1.7B
    """
    from rac_modifier.checkpoint.measured import record_activations
    from rac_modifier.cli.tables import render_results
    from rac_modifier.evaluation.activations import check_original, choose_activations, layers_of
    from rac_modifier.problems.held_out import held_out_problems

    layers, left_out = layers_of(folder, recorded=dense is None)
    original = None
    if dense is not None:
        check_model(resolve(dense))
    model, tokenizer = load_on_accelerator(str(folder), Dtype.FLOAT32)
    if dense is not None:
        original, _ = load_on_accelerator(dense, Dtype.FLOAT32)
        check_original(model, original, layers)
    problems = held_out_problems(source, sequences, seed, column, None)
    samples = own_samples(str(folder), model, tokenizer, problems, cap, 64, seed)
    choice = choose_activations(model, layers, samples, limit, original)
    entry = {**choice.as_dict(source), "left_out": left_out}
    if not check:
        record_activations(folder, choice.modules, entry)
    if as_json:
        print_json({**entry, "written": not check})
        return
    typer.echo(render_results(choice.table()))
    for reason, count in left_out.items():
        typer.echo(f"left out: {count} modules: {reason}")
    typer.echo(choice.describe())
    typer.echo(
        "nothing was written (--check)" if check else f"written into config.json of {folder}"
    )
