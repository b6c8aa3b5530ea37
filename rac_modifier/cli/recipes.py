"""`rac recipes`: list the recipes that ship with the package, and print one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
