"""`rac prune`: a recipe applied to a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rac_modifier.cli import options
from rac_modifier.cli.models import (
    check_loading,
    check_model,
    check_output,
    check_paths,
    compress,
    load_tokenizer,
    resolve,
)

if TYPE_CHECKING:
    from rac_modifier.settings.entries import CalibrationEntry

_ABOUT_DEFAULT = f"""\
no --recipe: taking {options.DEFAULT_RECIPE}, int4 with an int8 head (others: rac recipes)
it samples 262,144 tokens of the model's own answers to arithmetic problems, and calibrates on them
your problems: --set traces.problems.source=FILE; a shorter run: --set calibration.tokens=65536"""


def prune(
    context: typer.Context,
    model: options.Model,
    output: Annotated[Path, typer.Argument(help="folder for the checkpoint; new or empty")],
    recipe: options.Recipe = Path(options.DEFAULT_RECIPE),
    set_: options.Overrides = None,
    precision: options.Precision = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="only check the command: nothing is written")
    ] = False,
) -> None:
    """Prune or quantize a model with a recipe, and save it.

    Samples the model's own chains of thought (or reads them from a store), calibrates on them and
    prunes layer by layer: llm-compressor's oneshot, with recipe and output folder checked first.

    Example: rac prune reasoner reasoner-2of4 --recipe rac_2of4 --set calibration.tokens=32768
    """
    from rac_modifier.settings.recipe import CheckedRecipe

    if options.processes() == 1:
        CheckedRecipe.load(recipe, set_ or [])
        check_paths([model], output)
    from rac_modifier.checkpoint.output_folder import reserved
    from rac_modifier.distributed.torchrun import joined_processes

    # joined first: a machine that refuses the command ends the others
    with options.resumable(lambda: _how_to_go_on(output)), joined_processes() as processes:
        given = context.get_parameter_source("recipe")
        if processes.is_first and given is not None and given.name == "DEFAULT":
            typer.echo(_ABOUT_DEFAULT)
        loaded, source = CheckedRecipe.load(recipe, set_ or []), resolve(model)
        check_model(source)
        if processes.machine == 0:
            check_output(output, source, keeps_groups=True)
        check_loading(source)
        if check:
            for line in _need_of_traces(loaded.check(), source):
                typer.echo(line)
            typer.echo(f"{recipe}, {model} and {output} are fine; run the command without --check")
            return
        with reserved(output, writes=processes.is_first):
            compress(loaded.content, source, output, precision)
            processes.wait()
    if processes.is_first:
        typer.echo(f"saved to {output}; look at it with: rac inspect {output}")


def _need_of_traces(settings: "CalibrationEntry", source: str) -> Iterator[str]:
    from rac_modifier.calibration.trace_pool import describe_need

    if settings.calibration.parts("traces"):
        need = settings.reserved_tokens
        tokenizer = load_tokenizer(source)
        yield from describe_need(tokenizer, settings.traces, settings.calibration, need)


def _how_to_go_on(output: Path) -> str:
    from rac_modifier.checkpoint.output_folder import unfinished

    results = "traces that were collected so far"
    if unfinished(output).is_dir():
        results += f" and what is pruned so far ({unfinished(output)})"
    return options.saving_step(output, f"{results} are kept and will be used")
