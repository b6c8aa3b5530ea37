"""`rac schema`: what a recipe may set."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer


def schema(
    modifier: Annotated[
        str, typer.Argument(help="or ReasoningAwareCalibrationModifier, which calibrates others' modifiers")
    ] = "ReasoningAwareSparseGPTModifier",
) -> None:
    """Print the JSON Schema of a recipe entry (docs/recipe.schema.json, docs/calibration.schema.json)."""
    with contextlib.redirect_stdout(sys.stderr):  # where llm-compressor logs to while it is imported
        from rac_modifier.settings.recipe import schema as text

    typer.echo(text(modifier), nl=False)
