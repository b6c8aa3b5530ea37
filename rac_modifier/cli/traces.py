"""`rac traces`: collect a model's own chains of thought, inspect them, export them."""

from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rac_modifier.cli import options
from rac_modifier.cli.models import (
    check_paths,
    load,
    load_tokenizer,
    own_server,
    resolve,
    subject_of,
)
from rac_modifier.errors import RacError

if TYPE_CHECKING:
    from rac_modifier.traces.records import Trace
    from rac_modifier.traces.store import TraceStore

_CONCURRENCY = 64  # the default

app = typer.Typer(
    help="Collect a model's own chain-of-thought traces, inspect and export them.\n\n"
    "Example: rac traces collect --help",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Store = Annotated[Path, typer.Argument(exists=True, help="trace store, a .jsonl file")]
StoresModel = Annotated[
    str | None,
    typer.Option(
        help="model whose tokenizer reads the traces; default: the one in the header of the store"
    ),
]

Select = Annotated[
    str | None,
    typer.Option(help="a selection, written as in a recipe: '{answers: correct, finished: true}'"),
]


@app.command("collect", short_help="Sample the traces that a recipe will calibrate on.")
def _collect(
    model: options.Model,
    recipe: options.Recipe,
    set_: options.Overrides = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="sample with a vllm serve, which is stopped at the end")
    ] = False,
    concurrency: Annotated[
        int, typer.Option(min=1, max=4096, help="with --serve: traces in progress at once")
    ] = _CONCURRENCY,
    precision: options.Precision = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Sample the traces that a recipe will calibrate on, and with `recover:` train on.

    A run that was killed continues where it ended when it is started again. `rac prune` with the
    same recipe uses the traces, whether this process or a server sampled them.

    Example: rac traces collect reasoner --recipe rac_2of4 --set calibration.tokens=32768
    """
    from rac_modifier.settings.recipe import CheckedRecipe

    settings = CheckedRecipe.load(recipe, set_ or []).check()
    check_paths([model])
    from rac_modifier.calibration.trace_pool import collect_for_calibration, first_questions

    traces = settings.traces
    if serve and traces.engine:
        raise RacError(
            f"--serve starts a server; the recipe names {traces.engine.base_urls[0]}; leave one out"
        )
    if concurrency != _CONCURRENCY and not serve:
        raise RacError(f"--concurrency {concurrency} is for --serve; set traces.engine.concurrency")
    server: Any = nullcontext(traces.engine)
    if serve:
        server = own_server(
            model, precision, concurrency, first_questions(traces, settings.calibration)
        )
    with (
        options.resumable("the traces so far are kept; run the same command again to go on"),
        server as engine,
    ):
        loaded, tokenizer = subject_of(model) if engine else load(model, precision)
        pools = collect_for_calibration(
            loaded,
            tokenizer,
            traces.model_copy(update={"engine": engine}),
            settings.calibration,
            reserved_tokens=settings.reserved_tokens,
        )
    figures: dict[str, dict[str, Any]] = {
        part: {
            "store": pool.store.path,
            "traces": len(pool.store),
            "tokens": pool.store.counts.tokens,
            "selected": pool.selection.kept,
            "usable_tokens": pool.usable_tokens(),
            "not_selected": pool.selection.total - pool.selection.kept,
            "held_out": len(pool.held_out),
            "for_recovery": len(pool.reserved),
        }
        for part, pool in pools.items()
    }
    if as_json:
        options.print_json({"parts": figures})
        return
    for part, row in figures.items():
        typer.echo(f"{row['store']}: {row['traces']:,} traces, {row['tokens']:,} tokens")
        if row["selected"] < row["traces"]:
            others = ("held_out", "for_recovery", "not_selected")
            rest = (f", {row[name]:,} {name.replace('_', ' ')}" for name in others if row[name])
            used = f"{row['selected']:,} for calibration ({row['usable_tokens']:,} tokens)"
            typer.echo(f"{part}: {used}{''.join(rest)}")


@app.command("inspect", short_help="Print what a trace store holds.")
def _inspect(
    store: Store,
    samples: Annotated[
        int | None,
        typer.Option(min=0, help="how many traces to print as text; default: 1, with --json 0"),
    ] = None,
    select: Select = None,
    model: StoresModel = None,
    as_json: options.AsJson = False,
) -> None:
    """Print what a trace store holds: model, problems, settings, counts, lengths, first traces.

    Example: rac traces inspect traces.jsonl --samples 0
    """
    from dataclasses import asdict

    from rac_modifier.traces import selection
    from rac_modifier.traces.store import TraceStore

    opened = TraceStore.read(store)
    settings = selection.read_select(select)
    count = (0 if as_json else 1) if samples is None else samples
    if not as_json:  # before the tokenizer is loaded, which may be missing
        options.echo(selection.describe_store(opened))
    selected: dict[str, Any] = {}
    shown: list[dict[str, Any]] = []
    if count or settings is not None:
        tokenizer = _tokenizer_of(opened, model, "or give --samples 0 alone for the counts")
        if settings is not None:
            selected = selection.selected_figures(opened, tokenizer, settings)
        shown = [_sample(trace, tokenizer) for trace in islice(opened, count)]
    if as_json:
        figures = {
            "store": opened.path,
            "header": opened.header.model_dump(mode="json"),
            "counts": asdict(opened.counts),
            "endings": selection.count_endings(opened),
        }
        options.print_json(figures | selected | ({"samples": shown} if shown else {}))
        return
    if selected:
        typer.echo(f"selection   {selected['selection']}; {selected['selected_tokens']:,} tokens")
    for sample in shown:
        options.echo(
            f"\n--- {sample['id']} ({sample['finish_reason']}, answer: {sample['answer']})"
        )
        options.echo(sample["text"])


def _sample(trace: "Trace", tokenizer: Any) -> dict[str, Any]:
    text = tokenizer.decode([*trace.prompt_ids, *trace.completion_ids])
    shown = {name: getattr(trace, name) for name in ("id", "finish_reason", "answer")}
    return {**shown, "text": text}


@app.command("export", short_help="Write a store as Parquet or JSON Lines.")
def _export(
    store: Store,
    output: Annotated[Path, typer.Argument(help="file to write, .parquet or .jsonl")],
    select: Select = None,
    text: Annotated[bool, typer.Option("--text", help="add prompt and completion as text")] = False,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format", help="parquet, jsonl, or imatrix (text for llama.cpp); default: the suffix"
        ),
    ] = None,
    model: StoresModel = None,
) -> None:
    """Write a store with the columns input_ids, attention_mask and loss_mask (1 for completions).

    Repeating tails are cut, as for calibration. `llama-imatrix -f FILE --parse-special` reads what
    `--format imatrix` writes.

    Example: rac traces export traces.jsonl traces.parquet --text
    """
    from rac_modifier.calibration.dataset import export_store
    from rac_modifier.traces import selection
    from rac_modifier.traces.store import TraceStore

    settings = selection.read_select(select)
    needs_tokenizer = (
        text or file_format == "imatrix" or (settings is not None and settings.answers == "correct")
    )
    if model is not None and not needs_tokenizer:
        raise RacError(f"--model {model} has no effect without --text; leave it out, or add --text")
    opened = TraceStore.read(store)
    tokenizer = _tokenizer_of(opened, model, "or leave --text out") if needs_tokenizer else None
    rows = export_store(
        opened, output, settings=settings, tokenizer=tokenizer, text=text, file_format=file_format
    )
    typer.echo(f"{output}: {rows:,} {'traces' if file_format == 'imatrix' else 'rows'}")


def _tokenizer_of(store: "TraceStore", model: str | None, otherwise: str) -> Any:
    from rac_modifier.sampling.model_identity import tokenizer_fingerprint

    name = resolve(model or store.header.model)
    tokenizer = load_tokenizer(name, f"name the store's model with --model, {otherwise}")
    if tokenizer_fingerprint(tokenizer) != store.header.tokenizer:
        raise RacError(f"{name!r}: another tokenizer than the store's model; name it with --model")
    return tokenizer
