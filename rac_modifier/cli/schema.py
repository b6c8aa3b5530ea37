"""`rac schema`: what a recipe may set."""

from __future__ import annotations

import contextlib
import sys

import typer


def schema() -> None:
    """Print the JSON Schema of the recipe entry (docs/recipe.schema.json)."""
    with contextlib.redirect_stdout(sys.stderr):  # where llm-compressor logs to while it is imported
        from rac_modifier.recipe import schema as text

    typer.echo(text(), nl=False)
