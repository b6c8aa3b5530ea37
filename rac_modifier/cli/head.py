"""`rac head`: what rounding the output head, as RAC_LM_HEAD does while a model is loaded, costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rac_modifier.cli.models import check_model, load_on_accelerator, own_samples, resolve
from rac_modifier.cli.options import (
    SAMPLING,
    AsJson,
    BatchSize,
    Cap,
    Column,
    Dtype,
    Model,
    Precision,
    Seed,
    Sequences,
    Source,
    print_json,
)
from rac_modifier.cli.protocol import written_options
from rac_modifier.errors import RacError


def head(
    context: typer.Context,
    model: Model,
    bits: Annotated[
        list[int] | None, typer.Option(help="8 or 4 (repeatable); default: both")
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(metavar="STORE", help="measure on the model's own traces; default: sample it"),
    ] = None,
    sequences: Sequences = 64,
    source: Source = "arithmetic",
    column: Column = None,
    cap: Cap = 256,
    batch_size: BatchSize = 64,
    seed: Seed = 0,
    precision: Precision = Dtype.AUTO,
    as_json: AsJson = False,
) -> None:
    """Measure what a rounded head costs: KL and top-1 agreement with the unrounded one, on the model's own samples.

    vllm serve rounds the head with RAC_LM_HEAD=int8 or int4; this rounds it with the same function.

    Example: rac head reasoner --bits 4
    """
    from rac_modifier.checkpoint.round_to_nearest import HEAD_BITS

    widths = list(dict.fromkeys(bits or HEAD_BITS))
    if unknown := [width for width in widths if width not in HEAD_BITS]:
        raise RacError(f"--bits {unknown[0]}: a head can be rounded to 8 or 4 bits")
    if traces is not None and (idle := written_options(context) & set(SAMPLING)):
        option = min(idle).replace("_", "-")
        raise RacError(
            f"--{option} is for sampling and has no effect on stored traces; leave it or --traces out"
        )
    check_model(resolve(model))
    from rac_modifier.cli.tables import render_results
    from rac_modifier.evaluation.own_samples import sequences_from_store
    from rac_modifier.evaluation.rounded_head import measure_rounded_head, rounded_head_table
    from rac_modifier.problems.held_out import held_out_problems

    loaded, tokenizer = load_on_accelerator(model, precision)
    if traces is None:
        problems = held_out_problems(source, sequences, seed, column, None)
        measured_on = own_samples(model, loaded, tokenizer, problems, cap, batch_size, seed)
    else:
        measured_on = sequences_from_store(traces, loaded, limit=sequences)
    found = [measure_rounded_head(loaded, measured_on, width) for width in widths]
    if as_json:
        print_json({"heads": [each.as_dict() for each in found]})
    else:
        typer.echo(render_results(rounded_head_table(found)))
