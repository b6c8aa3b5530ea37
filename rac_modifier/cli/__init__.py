"""The `rac` command, a module for each of its commands. It only wires; every error a user can cause ends in one message."""

from __future__ import annotations

import sys

import typer

from rac_modifier.cli import recipes, traces
from rac_modifier.cli.eval import evaluate
from rac_modifier.cli.inspect import inspect
from rac_modifier.cli.prune import prune, schema
from rac_modifier.cli.recover import recover
from rac_modifier.errors import RacError

app = typer.Typer(
    help="Make reasoning models sparse without breaking how they think.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(traces.app, name="traces")
app.add_typer(recipes.app, name="recipes")
app.command()(prune)
app.command()(recover)
app.command("eval")(evaluate)
app.command()(inspect)
app.command()(schema)


def main() -> None:
    """Entry point: a RacError becomes its message and exit code 2."""
    from pydantic import ValidationError

    try:
        app()
    except RacError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except ValidationError as error:
        from rac_modifier.settings.recipe import describe_errors

        typer.secho(f"error: {describe_errors(error)}", fg="red", err=True)
        sys.exit(2)
