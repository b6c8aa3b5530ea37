"""The `rac` command: traces, prune, eval, inspect. It only wires; every error a user can cause ends in one message."""

from __future__ import annotations

import contextlib
import shutil
import sys
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from rac_modifier.errors import RacError

app = typer.Typer(
    help="Make reasoning models sparse without breaking how they think.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
traces_app = typer.Typer(help="Collect a model's own chain-of-thought traces, and look at them.", no_args_is_help=True)
app.add_typer(traces_app, name="traces")

Model = Annotated[str, typer.Argument(help='a model folder, a Hugging Face id, or "reasoner" for the embedded one')]
Recipe = Annotated[Path, typer.Option("--recipe", "-r", help="recipe file, such as recipes/rac_2of4.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", help="change one setting of the recipe, e.g. --set calibration.tokens=32768 (repeatable)"
    ),
]


class Dtype(StrEnum):
    """What `--precision` takes."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class PresetName(StrEnum):
    """What `--preset` takes."""

    QUALITY = "quality"
    FAST = "fast"
    PAPER = "paper"


Precision = Annotated[
    Dtype,
    typer.Option(help="dtype of the weights (auto: as stored); float32 is faster on a CPU without bf16 units"),
]


@traces_app.command("collect")
def traces_collect(model: Model, recipe: Recipe, set_: Overrides = None, precision: Precision = Dtype.AUTO) -> None:
    """Sample the traces that a recipe will calibrate on, without pruning.

    Killed and started again, it goes on where it was. `rac prune` with the same recipe then finds them.

    Example: rac traces collect reasoner --recipe recipes/rac_2of4.yaml --set calibration.tokens=32768
    """
    from rac_modifier.calibration.source import collect_for_calibration
    from rac_modifier.recipe import check_entry, find_entry, load_recipe

    content = load_recipe(recipe, set_)
    settings = check_entry(find_entry(content, str(recipe)), str(recipe))
    loaded, tokenizer = _subject(model) if settings.traces.engine else _load(model, precision)
    store = collect_for_calibration(loaded, tokenizer, settings.traces, settings.calibration)
    typer.echo(f"{store.path}: {len(store):,} traces, {store.counts.tokens:,} tokens")


@traces_app.command("inspect")
def traces_inspect(
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
    name = _resolve(model or opened.header.model)
    tokenizer = _tokenizer(name, "name the store's model with --model, or give --samples 0 for the counts alone")
    if tokenizer_fingerprint(tokenizer) != opened.header.tokenizer:
        raise RacError(f"{name!r} has another tokenizer than the store's model; name that model with --model")
    for trace in islice(opened, samples):
        typer.echo(f"\n--- {trace.id} ({trace.finish_reason}, answer: {trace.answer})")
        typer.echo(tokenizer.decode([*trace.prompt_ids, *trace.completion_ids]))


@app.command()
def prune(
    model: Model,
    output: Annotated[Path, typer.Argument(help="folder for the sparse checkpoint; new or empty")],
    recipe: Recipe,
    preset: Annotated[
        PresetName | None,
        typer.Option(
            help="in place of the recipe's: quality (the default), fast, or paper for the RAC paper's own way"
        ),
    ] = None,
    set_: Overrides = None,
    precision: Precision = Dtype.AUTO,
) -> None:
    """Prune a model as a recipe says, and save it as a sparse checkpoint.

    Samples the model's own chains of thought (or reads them from a store), calibrates on them and
    prunes layer by layer: llm-compressor's oneshot, with recipe and output folder checked first.

    Example: rac prune reasoner reasoner-2of4 --recipe recipes/rac_2of4.yaml --set calibration.tokens=32768
    """
    import yaml

    import rac_modifier  # noqa: F401 - registers the modifier
    from rac_modifier.recipe import load_recipe

    content = load_recipe(recipe, [*(set_ or []), *([f"preset={preset}"] if preset else [])])
    source = _resolve(model)
    _check_model(source)
    _check_output(output, source)
    from llmcompressor import oneshot

    oneshot(
        model=source,
        recipe=yaml.safe_dump(content, sort_keys=False),
        precision=precision.value,
        output_dir=str(output),
    )
    typer.echo(f"saved to {output}; look at it with: rac inspect {output}")


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help='folders, Hugging Face ids or "reasoner"; the dense one first')],
    problems: Annotated[int, typer.Option(min=1, help="how many problems")] = 300,
    source: Annotated[
        str,
        typer.Option(
            help='"arithmetic" (held out from calibration), reasoning-gym:TASK, a .jsonl, .json or .parquet file, '
            "or a dataset id"
        ),
    ] = "arithmetic",
    column: Annotated[str | None, typer.Option(help="column of the question (file or dataset)")] = None,
    answer_column: Annotated[str | None, typer.Option(help="column of the answer (file or dataset)")] = None,
    cap: Annotated[int, typer.Option(min=1, help="new tokens after which an answer counts as never finished")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy; default: greedy, with --divergence the model's own")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="answers generated together")] = 128,
    seed: Annotated[int, typer.Option(help="seed of problems and sampling")] = 0,
    precision: Precision = Dtype.AUTO,
    direct: Annotated[
        bool, typer.Option("--direct", help="close the thinking before it begins: what the model knows without it")
    ] = False,
    divergence: Annotated[
        bool,
        typer.Option("--divergence", help="instead: KL and top-1 agreement with the dense model on its own samples"),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="with --divergence: plot it against the position in the completion, as .png")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="write the results to this file too")] = None,
) -> None:
    """Compare models: accuracy with its interval, thinking length, share that never finishes, speed.

    All get the same problems, asked zero-shot through the chat template, and the same cap. With --divergence no answer is
    checked: the first model is sampled, and the others are measured against its predictions, token by token.

    Example: rac eval reasoner reasoner-2of4 --problems 300 --cap 512
    """
    from rac_modifier.checkpoint.record import write_json_atomic
    from rac_modifier.evaluation.accuracy import evaluate as run
    from rac_modifier.evaluation.problems import held_out_problems
    from rac_modifier.evaluation.report import render_table
    from rac_modifier.reasoner import direct_answer_prompt
    from rac_modifier.traces.prompts import render_prompt

    if json_out is not None and not json_out.absolute().parent.is_dir():
        raise RacError(f"--json {json_out}: its folder does not exist; create it first")
    if divergence and len(models) < 2:
        raise RacError("--divergence compares pruned models with the first one; name at least two models")
    if divergence and direct:
        raise RacError("--divergence samples the model with its thinking; give it without --direct")
    if plot is not None and not divergence:
        raise RacError("--plot draws divergence against position; give --divergence too")
    for name in models:
        _check_model(_resolve(name))
    chosen = held_out_problems(source, problems, seed, column, answer_column)
    if divergence:
        from rac_modifier.traces.generation import SamplingSettings

        sampling = SamplingSettings(temperature=temperature, max_new_tokens=cap, batch_size=batch_size, seed=seed)
        _divergence(models, chosen, sampling, precision, plot, json_out)
        return
    results = []
    for name in models:
        loaded, tokenizer = _load(name, precision)
        results.append(
            run(
                loaded,
                tokenizer,
                chosen,
                label=name,
                render=direct_answer_prompt if direct else render_prompt,
                max_new_tokens=cap,
                temperature=temperature or 0.0,
                batch_size=batch_size,
                seed=seed,
            )
        )
    typer.echo(render_table(results))
    if json_out is not None:
        write_json_atomic(json_out, {"results": [result.as_dict() for result in results]})


def _divergence(
    models: list[str], problems: list[Any], sampling: Any, precision: Dtype, plot: Path | None, json_out: Path | None
) -> None:
    from rac_modifier.checkpoint.record import write_json_atomic
    from rac_modifier.evaluation.divergence import divergence
    from rac_modifier.evaluation.own_samples import sample_sequences
    from rac_modifier.evaluation.plot import plot_divergence
    from rac_modifier.evaluation.report import render_divergence_table

    dense, tokenizer = _load(models[0], precision)
    sequences = sample_sequences(dense, tokenizer, problems, sampling)
    results = [divergence(dense, _load(name, precision)[0], sequences, label=name) for name in models[1:]]
    typer.echo(render_divergence_table(results))
    if plot is not None:
        plot_divergence(results, plot)
    if json_out is not None:
        write_json_atomic(json_out, {"divergence": [result.as_dict() for result in results]})


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a checkpoint, sparse or not")],
) -> None:
    """Say what a checkpoint holds, and whether serving it on this machine will be faster: if not, why not."""
    from rac_modifier.checkpoint.inspect import inspect_checkpoint
    from rac_modifier.serving.chooser import plan_checkpoint, render_plan

    typer.echo(inspect_checkpoint(checkpoint).render())
    if rows := plan_checkpoint(checkpoint):
        typer.echo(f"\nServed with vLLM on this machine's CPU:\n{render_plan(rows)}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the recipe entry (docs/recipe.schema.json)."""
    with contextlib.redirect_stdout(sys.stderr):  # where llm-compressor logs to while it is imported
        from rac_modifier.recipe import schema as text

    typer.echo(text(), nl=False)


def _resolve(model: str) -> str:
    from rac_modifier.reasoner import reasoner_path

    return str(reasoner_path()) if model == "reasoner" else model


def _check_model(source: str) -> None:
    """Find out before hours of work whether there is such a model."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise RacError(
            f'no model at {source!r} ({_first_line(error)}); give a model folder, a Hugging Face id, or "reasoner"'
        ) from error


def _tokenizer(source: str, next_step: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise RacError(f"no tokenizer could be loaded from {source!r} ({_first_line(error)}); {next_step}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def _load(model: str, precision: Dtype) -> tuple[Any, Any]:
    from rac_modifier.checkpoint.load import load_model

    source = _resolve(model)
    _check_model(source)
    tokenizer = _tokenizer(source, "save the model's tokenizer beside it")
    return load_model(source, dtype=precision.value), tokenizer


def _subject(model: str) -> tuple[Any, Any]:
    """What collecting needs to know of a model that servers sample; its weights stay on disk."""
    from rac_modifier.traces.subject import Subject

    source = _resolve(model)
    _check_model(source)
    tokenizer = _tokenizer(source, "save the model's tokenizer beside it")
    return Subject.of_files(source), tokenizer


def _check_output(output: Path, source: str) -> None:
    """Find out before hours of work that the result could not be written."""
    if output.exists() and not output.is_dir():
        raise RacError(f"output {output} is a file; name a folder")
    if output.is_dir() and any(output.iterdir()):
        raise RacError(f"output folder {output} is in use; name an empty or a new one")
    if Path(source).is_dir():
        need = sum(f.stat().st_size for f in Path(source).glob("*.safetensors")) * 2
        parent = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
        free = shutil.disk_usage(parent).free
        if free < need:
            raise RacError(
                f"{output}: {free / 2**30:.1f} GiB are free, the checkpoint needs up to {need / 2**30:.1f} GiB while it is "
                "packed; free some or name a folder on another disk"
            )


def main() -> None:
    """Entry point: a RacError becomes its message and exit code 2."""
    from pydantic import ValidationError

    try:
        app()
    except RacError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except ValidationError as error:
        from rac_modifier.recipe import describe_errors

        typer.secho(f"error: {describe_errors(error)}", fg="red", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
