"""`rac inspect`: what a checkpoint holds, and how it would be served here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="folder of a checkpoint, sparse or not")],
) -> None:
    """Say what a checkpoint holds, and whether serving it on this machine will be faster: if not, why not."""
    from rac_modifier.checkpoint.inspect import inspect_checkpoint
    from rac_modifier.kernels.plan import plan_checkpoint, render_plan

    typer.echo(inspect_checkpoint(checkpoint).render())
    if rows := plan_checkpoint(checkpoint):
        typer.echo(f"\nServed with vLLM on this machine's CPU:\n{render_plan(rows)}")
