"""`rac traces`: collect a model's own chains of thought, and look at them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from rac_modifier.cli.models import load, load_tokenizer, resolve, subject_of
from rac_modifier.cli.options import Dtype, Model, Overrides, Precision, Recipe
from rac_modifier.errors import RacError

app = typer.Typer(help="Collect a model's own chain-of-thought traces, and look at them.", no_args_is_help=True)


@app.command("collect")
def collect(model: Model, recipe: Recipe, set_: Overrides = None, precision: Precision = Dtype.AUTO) -> None:
    """Sample the traces that a recipe will calibrate on, without pruning.

    Killed and started again, it goes on where it was. `rac prune` with the same recipe then finds them.

    Example: rac traces collect reasoner --recipe recipes/rac_2of4.yaml --set calibration.tokens=32768
    """
    from rac_modifier.calibration.source import collect_for_calibration
    from rac_modifier.recipe import check_entry, find_named_entry, load_recipe

    name, entry = find_named_entry(load_recipe(recipe, set_), str(recipe))
    settings = check_entry(entry, str(recipe), name)
    loaded, tokenizer = subject_of(model) if settings.traces.engine else load(model, precision)
    store = collect_for_calibration(loaded, tokenizer, settings.traces, settings.calibration)
    typer.echo(f"{store.path}: {len(store):,} traces, {store.counts.tokens:,} tokens")


@app.command("inspect")
def inspect(
    store: Annotated[Path, typer.Argument(help="trace store, a .jsonl file")],
    samples: Annotated[int, typer.Option(min=0, help="traces to print whole")] = 1,
    model: Annotated[
        str | None, typer.Option(help="model whose tokenizer reads the traces; default: the one that the store names")
    ] = None,
) -> None:
    """Say what a trace store holds: model, problems, sampling settings, counts, and the first traces as text."""
    from rac_modifier.traces.fingerprint import tokenizer_fingerprint
    from rac_modifier.traces.store import TraceStore

    opened = TraceStore.read(store)
    counts = opened.counts
    typer.echo(f"model       {opened.header.model} (fingerprint {opened.header.fingerprint[:12]})")
    typer.echo(f"problems    {opened.header.problems.source}")
    typer.echo(f"sampling    {opened.header.sampling.model_dump_json(exclude_none=True)}")
    if opened.header.engine is not None:
        typer.echo(f"engine      {opened.header.engine.kind} {opened.header.engine.served_model or ''}".rstrip())
    typer.echo(
        f"traces      {counts.traces:,} ({counts.finished:,} finished), {counts.prompt_tokens:,} prompt and "
        f"{counts.completion_tokens:,} completion tokens"
    )
    if samples == 0:
        return
    name = resolve(model or opened.header.model)
    tokenizer = load_tokenizer(name, "name the store's model with --model, or give --samples 0 for the counts alone")
    if tokenizer_fingerprint(tokenizer) != opened.header.tokenizer:
        raise RacError(f"{name!r} has another tokenizer than the store's model; name that model with --model")
    for trace in islice(opened, samples):
        typer.echo(f"\n--- {trace.id} ({trace.finish_reason}, answer: {trace.answer})")
        typer.echo(tokenizer.decode([*trace.prompt_ids, *trace.completion_ids]))
