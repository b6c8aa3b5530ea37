"""The `rac` command, a module for each of its commands. It only wires; every error a user can cause ends in one message.

Exit codes (docs/cli.md): 0 done, 1 an error of the user (RacError), 2 wrong use of the command, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer
import typer.core

from rac_modifier.cli import recipes, traces
from rac_modifier.cli.doctor import doctor
from rac_modifier.cli.eval import evaluate
from rac_modifier.cli.frontier import frontier
from rac_modifier.cli.inspect import inspect
from rac_modifier.cli.options import resumable
from rac_modifier.cli.pack import pack, unpack
from rac_modifier.cli.prune import prune, schema
from rac_modifier.cli.recover import recover
from rac_modifier.cli.report import report
from rac_modifier.errors import RacError


class Commands(typer.core.TyperGroup):
    """The commands. Ctrl-C where a command has nothing better to say ends in one line and exit code 130, too."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        with resumable("run the same command again"):
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that was named; under torchrun only those that are distributed."""
        command = super().resolve_command(ctx, args)
        if os.environ.get("WORLD_SIZE", "1") not in ("", "1") and command[0] not in (
            "prune",
            "recover",
        ):
            from rac_modifier.processes import refuse_processes

            refuse_processes(f"rac {command[0]}")
        return command


app = typer.Typer(
    cls=Commands,
    help="Make reasoning models sparse without breaking how they think.\n\nExample: rac prune --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"max_content_width": 100},
    rich_markup_mode=None,  # plain help: a line per option, where boxes take two or three
)
app.command(short_help="Prune or quantize a model with a recipe.")(prune)
app.command(short_help="Train the kept weights of a sparse or quantized model.")(recover)
app.add_typer(
    traces.app,
    name="traces",
    short_help="Collect a model's own traces, look into a store, export it.",
)
app.add_typer(
    recipes.app, name="recipes", short_help="List the recipes that ship with the package."
)
app.command("eval", short_help="Compare models: accuracy, thinking, divergence.")(evaluate)
app.command(short_help="Run a grid of recipes on a model, and measure each.")(frontier)
app.command(short_help="Draw what rac frontier measured, as one HTML page.")(report)
app.command(short_help="Show what a checkpoint holds, and how it would be served.")(inspect)
app.command(short_help="Pack the zeros of a pruned model away.")(pack)
app.command(short_help="Write a packed checkpoint with dense weights.")(unpack)
app.command(short_help="Print the JSON Schema of a recipe entry.")(schema)
app.command(short_help="Print versions, extras, kernels and devices.")(doctor)


def main() -> None:
    """Entry point: a RacError becomes its message and exit code 1."""
    from pydantic import ValidationError

    _silence_bars()
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        os.environ.setdefault(
            "TORCH_CPP_LOG_LEVEL", "ERROR"
        )  # its warnings are of what our errors say better
    try:
        app()
    except RacError as error:
        _end(error)
    except ModuleNotFoundError as error:
        typer.secho(f"error: {_how_to_install(error)}", fg="red", err=True)
        sys.exit(1)
    except ValidationError as error:
        from rac_modifier.settings.check import describe_errors

        typer.secho(f"error: {describe_errors(error)}", fg="red", err=True)
        sys.exit(1)


def _end(error: RacError) -> NoReturn:
    """Print a message and leave with exit code 1."""
    said: bool | None = getattr(error, "said", None)
    if not said:  # else another process prints it
        typer.secho(f"error: {error}", fg="red", err=True)
    if (
        said is not None
    ):  # the other process is gone, and gloo would wait for it at the end of this one
        sys.stderr.flush()
        os._exit(1)
    sys.exit(1)


def _silence_bars() -> None:
    """No progress bars in a file or a pipe, of other libraries either. They read these variables when they are imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _how_to_install(error: ModuleNotFoundError) -> str:
    """The next step for a package that an extra installs.

    Raises:
        ModuleNotFoundError: a module of this package, or of the standard library.
    """
    missing = (error.name or "").partition(".")[0]
    if missing in ("", "rac_modifier") or missing in sys.stdlib_module_names:
        raise error
    return f"this command needs {missing}, which is not installed; rac doctor shows which extra installs it"
