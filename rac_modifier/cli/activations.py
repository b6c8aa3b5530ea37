"""`rac activations`: which layers of a quantized sparse checkpoint lose nothing with activations in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rac_modifier.cli.models import load_on_accelerator, own_samples
from rac_modifier.cli.options import AsJson, Dtype, Precision, print_json


def activations(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="of a packed int8 or int4 checkpoint that rac made")],
    limit: Annotated[
        float, typer.Option(min=0, help="the most that 8 bits may add, as a share of the layer's own error")
    ] = 0.01,
    check: Annotated[bool, typer.Option("--check", help="only measure and print, write nothing")] = False,
    sequences: Annotated[int, typer.Option(min=1, help="samples of the model to measure on")] = 64,
    source: Annotated[
        str, typer.Option(help="of problems: arithmetic (held out), reasoning-gym:TASK, a file or a dataset id")
    ] = "arithmetic",
    column: Annotated[str | None, typer.Option(help="column of the question (file or dataset)")] = None,
    cap: Annotated[int, typer.Option(min=1, help="most new tokens of a sample")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="samples generated together")] = 64,
    seed: Annotated[int, typer.Option(help="seed of problems and sampling")] = 0,
    precision: Precision = Dtype.FLOAT32,
    as_json: AsJson = False,
) -> None:
    """Find the layers that lose nothing with activations in 8 bits in place of 16, and write them into config.json.

    vllm serve then multiplies those layers in half of the instructions, which pays from some requests at once on.

    Example: rac activations reasoner-2of4-int8
    """
    from rac_modifier.checkpoint.measured import record_activations
    from rac_modifier.cli.tables import render_results
    from rac_modifier.evaluation.activation_bits import (
        activation_table,
        measure_activations,
        quantized_layers,
        rounded_inputs,
    )
    from rac_modifier.evaluation.dense_reference import DenseReference
    from rac_modifier.problems.held_out import held_out_problems

    layers = quantized_layers(folder)
    model, tokenizer = load_on_accelerator(str(folder), precision)
    problems = held_out_problems(source, sequences, seed, column, None)
    samples = own_samples(str(folder), model, tokenizer, problems, cap, batch_size, seed)
    found = measure_activations(model, layers, samples)
    chosen = [each.layer for each in found if each.loses_nothing(limit)]
    reference = DenseReference(model, samples)
    with rounded_inputs(model, chosen):
        divergence = reference.divergence(model, label="8 bits").as_dict()
    entry = {
        "limit": limit,
        "source": source,
        "layers": {
            each.layer.module: {"error": each.error, "bits": 8 if each.layer in chosen else 16} for each in found
        },
        **{key: divergence[key] for key in ("sequences", "tokens", "kl", "kl_stderr", "agreement")},
    }
    if not check:
        record_activations(folder, [layer.module for layer in chosen], entry)
    if as_json:
        print_json({**entry, "written": not check})
        return
    typer.echo(render_results(activation_table(found, limit)))
    typer.echo(
        f"{len(chosen)} of {len(found)} layers in 8 bits: KL {divergence['kl']:.2e} nats per token from the model with none, and "
        f"the most likely token is the same for {divergence['agreement']:.2%} of {divergence['tokens']:,}"
    )
    typer.echo("nothing was written (--check)" if check else f"written into config.json of {folder}")
