"""`rac recipes`: list, print and check recipes; `rac schema`: what a recipe may set."""

from pathlib import Path
from typing import Annotated

import typer

from rac_modifier.cli.options import DEFAULT_RECIPE, Overrides
from rac_modifier.errors import RacError
from rac_modifier.settings.recipe_files import recipe, recipe_names

app = typer.Typer()
# By the beginning of their names; the first group that fits.
_GROUPS: dict[str, str | tuple[str, ...]] = {
    "start here, and what rac prune takes without --recipe": DEFAULT_RECIPE,
    "fewer bits, still dense": "rac_w3a16",
    "sparse": ("rac_2of4", "rac_unstructured"),
    "fewer experts": "rac_reap",
    "methods of llm-compressor, on the model's own traces": "rac_",
}


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List the recipes that ship with rac-modifier; each name can be given to --recipe.

    --set changes one setting of a recipe, also of another modifier in it, such as
    REAPPruningModifier.sparsity=0.5.

    Example: rac recipes

    Example: rac recipes show rac_2of4
    """
    if context.invoked_subcommand is not None:
        return
    left = recipe_names()
    for title, prefixes in _GROUPS.items():
        typer.echo(f"\n{title}" if len(left) < len(recipe_names()) else title)
        for name in [name for name in left if name.startswith(prefixes)]:
            left.remove(name)
            first = Path(recipe(name)).read_text(encoding="utf-8").partition("\n")[0]
            typer.echo(f"  {name}\n      {first.removeprefix('#').strip()}")


@app.command("show")
def _show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="name of a recipe, as `rac recipes` lists it")
    ],
) -> None:
    """Print a recipe, to read it or to start one of your own from it.

    Example: rac recipes show rac_2of4 > my_recipe.yaml
    """
    typer.echo(Path(recipe(name)).read_text(encoding="utf-8"), nl=False)


@app.command("check")
def _check(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="files, or names of shipped recipes")
    ],
    set_: Overrides = None,
) -> None:
    """Check recipes, without a model.

    Example: rac recipes check my_recipe.yaml rac_2of4
    """
    from rac_modifier.settings.recipe import CheckedRecipe

    wrong = []
    for path in recipes:
        try:
            name, _ = CheckedRecipe.load(path, set_ or []).entry
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
