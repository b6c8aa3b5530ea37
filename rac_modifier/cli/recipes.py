"""`rac recipes`: list, print and check recipes; `rac schema`: what a recipe may set."""

from pathlib import Path
from typing import Annotated

import typer

from rac_modifier.cli.options import Overrides
from rac_modifier.errors import RacError
from rac_modifier.settings.recipe_files import recipe, recipe_names

app = typer.Typer()


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List the recipes that ship with rac-modifier; each name can be given to --recipe.

    Example: rac recipes

    Example: rac recipes show rac_2of4
    """
    if context.invoked_subcommand is not None:
        return
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        first = Path(recipe(name)).read_text(encoding="utf-8").partition("\n")[0]
        typer.echo(f"{name:<{width}}  {first.removeprefix('#').strip()}")


@app.command()
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="name of a recipe, as `rac recipes` lists it")
    ],
) -> None:
    """Print a recipe, to read it or to start one of your own from it.

    Example: rac recipes show rac_2of4 > my_recipe.yaml
    """
    typer.echo(Path(recipe(name)).read_text(encoding="utf-8"), nl=False)


@app.command()
def check(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="files, or names of shipped recipes")
    ],
    set_: Overrides = None,
) -> None:
    """Check recipes, without a model.

    Example: rac recipes check my_recipe.yaml rac_2of4
    """
    from rac_modifier.settings.recipe import find_named_entry, load_recipe

    wrong = []
    for path in recipes:
        try:
            name, _ = find_named_entry(load_recipe(path, set_ or []), str(path))
            typer.echo(f"{path}: valid ({name})")
        except RacError as error:
            wrong.append(str(error))
    if wrong:
        raise RacError("\n".join(wrong))


def schema(
    modifier: Annotated[
        str,
        typer.Argument(
            help="or ReasoningAwareCalibrationModifier, which calibrates other modifiers"
        ),
    ] = "ReasoningAwareSparseGPTModifier",
) -> None:
    """Print the JSON Schema of a recipe entry, as in docs/recipe.schema.json.

    Example: rac schema > recipe.schema.json
    """
    from rac_modifier.settings.recipe import schema as text

    typer.echo(text(modifier), nl=False)
