"""`rac prune`: a recipe applied to a model, or only checked; `rac schema`: what a recipe may set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rac_modifier.cli.models import (
    check_loading,
    check_model,
    check_output,
    read_with_overrides,
    resolve,
    unpacked,
)
from rac_modifier.cli.options import (
    AnyRecipe,
    Dtype,
    Overrides,
    Precision,
    resumable,
    saving_step,
)
from rac_modifier.errors import RacError


def prune(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help='a model folder, a Hugging Face id, or "reasoner" for the embedded one (with --check a recipe)',
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Argument(
            metavar="OUTPUT",
            help="folder for the sparse checkpoint; new or empty (with --check another recipe)",
        ),
    ] = None,
    more: Annotated[
        list[Path] | None, typer.Argument(hidden=True, help="with --check further recipes")
    ] = None,
    recipe: AnyRecipe = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="in place of the recipe's: quality (the default), fast, or paper, as in the paper"
        ),
    ] = None,
    set_: Overrides = None,
    precision: Precision = Dtype.AUTO,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="only check the command, or recipes: rac prune --check RECIPE..."
        ),
    ] = False,
) -> None:
    """Prune or quantize a model with a recipe, and save it.

    Samples the model's own chains of thought (or reads them from a store), calibrates on them and
    prunes layer by layer: llm-compressor's oneshot, with recipe and output folder checked first.

    Example: rac prune reasoner reasoner-2of4 --recipe rac_2of4 --set calibration.tokens=32768

    Example: rac prune --check my_recipe.yaml rac_2of4
    """
    overrides = [*(set_ or []), *([f"preset={preset}"] if preset else [])]
    if check and (model is None or recipe is None):
        if precision is not Dtype.AUTO:
            raise RacError(
                f"--precision {precision} has no effect on a check of recipes; leave it out"
            )
        check_recipes(
            [Path(path) for path in (model, output, *(more or ()), recipe) if path is not None],
            overrides,
        )
        return
    if model is None or output is None or recipe is None or more:
        raise typer.BadParameter(
            "rac prune needs a model, an output folder and a recipe: rac prune MODEL OUTPUT --recipe RECIPE; "
            "to check recipes alone: rac prune --check RECIPE...",
            param_hint="MODEL OUTPUT --recipe",
        )
    out, source = Path(output), resolve(model)
    if check:
        check_recipes([recipe], overrides)
    else:
        content = read_with_overrides(recipe, overrides)
    check_model(source)
    check_output(out, source, keeps_groups=True)
    check_loading(source, precision)
    if check:
        typer.echo(f"{model} and {output} are fine, too; run the same command without --check")
        return
    with resumable(lambda: _how_to_go_on(out)):
        import yaml
        from llmcompressor import oneshot

        import rac_modifier  # noqa: F401 - registers the modifier
        from rac_modifier.processes import joined_processes

        with joined_processes() as processes:
            oneshot(
                model=unpacked(source, precision),
                recipe=yaml.safe_dump(content, sort_keys=False),
                precision=precision.value,
                output_dir=output,
            )
            processes.wait()
    if processes.is_first:
        typer.echo(f"saved to {output}; look at it with: rac inspect {output}")


def check_recipes(paths: list[Path], overrides: list[str]) -> None:
    """Check recipes without llm-compressor or torch, and print a line for each valid one (RacError)."""
    from rac_modifier.settings.recipe import find_named_entry

    if not paths:
        raise RacError("--check needs at least one recipe: rac prune --check rac_2of4")
    wrong = []
    for path in paths:
        try:
            name, _ = find_named_entry(read_with_overrides(path, overrides), str(path))
        except RacError as error:
            wrong.append(str(error))
        else:
            typer.echo(f"{path}: valid ({name})")
    if wrong:
        raise RacError("\n".join(wrong))


def _how_to_go_on(output: Path) -> str:
    from rac_modifier.checkpoint.output_folder import unfinished

    kept = "the traces that were collected"
    if unfinished(output).is_dir():
        kept += f" and what is pruned so far ({unfinished(output)})"
    return saving_step(output, kept)


def schema(
    modifier: Annotated[
        str,
        typer.Argument(
            help="or ReasoningAwareCalibrationModifier, which calibrates other modifiers"
        ),
    ] = "ReasoningAwareSparseGPTModifier",
) -> None:
    """Print the JSON Schema of a recipe entry (docs/recipe.schema.json, docs/calibration.schema.json).

    Example: rac schema > recipe.schema.json
    """
    from rac_modifier.settings.recipe import schema as text

    typer.echo(text(modifier), nl=False)
