"""The `rac` command, a module for each of its commands; every error of a user ends in one message.

Exit codes (docs/cli.md): 0 done, 1 RacError, 2 wrong use of the command, 130 Ctrl-C.
"""

import os
import sys
from typing import Any

import typer
import typer.core

from rac_modifier.cli import recipes, traces
from rac_modifier.cli.doctor import doctor
from rac_modifier.cli.eval import evaluate
from rac_modifier.cli.frontier import frontier, report
from rac_modifier.cli.inspect import inspect
from rac_modifier.cli.options import printable, processes, resumable
from rac_modifier.cli.pack import pack, unpack
from rac_modifier.cli.prune import prune
from rac_modifier.cli.recover import recover
from rac_modifier.errors import RacError
from rac_modifier.runtime.progress import Phase

_MOST_PRINTED = 8000  # characters of an error


class _Commands(typer.core.TyperGroup):
    """The commands; Ctrl-C ends each in one line and exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        with resumable("run the same command again"), Phase("this command"):
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that was named; under torchrun only those that are distributed."""
        command = super().resolve_command(ctx, args)
        if processes() > 1 and command[0] not in ("prune", "recover"):
            raise RacError(
                f"rac {command[0]} runs in one process, and torchrun started {processes()}: start "
                "it without torchrun; only rac prune and rac recover are distributed"
            )
        return command


app = typer.Typer(
    cls=_Commands,
    help="Make reasoning models sparse without breaking how they think.\n\n"
    "Example: rac prune --help",
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
    recipes.app, name="recipes", short_help="List the shipped recipes, print one, check your own."
)
app.command("eval", short_help="Compare models: accuracy, thinking, divergence.")(evaluate)
app.command(short_help="Run a grid of recipes on a model, and measure each.")(frontier)
app.command(short_help="Draw what rac frontier measured, as one HTML page.")(report)
app.command(short_help="Show what a checkpoint holds, and how it would be served.")(inspect)
app.command(short_help="Pack the zeros of a pruned model away.")(pack)
app.command(short_help="Write a packed checkpoint with dense weights.")(unpack)
app.command(short_help="Print the JSON Schema of a recipe entry.")(recipes.schema)
app.command(short_help="Print versions, extras and kernels.")(doctor)


def main() -> None:
    """Run `rac`: a RacError becomes its message and exit code 1."""
    from pydantic import ValidationError

    if not sys.stderr.isatty():
        # no progress bars in a file or a pipe; libraries read these when they are imported
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if processes() > 1:  # torch's messages are of what our errors say better
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        app()
    except RacError as error:
        _print(str(error))
        sys.exit(1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "rac_modifier") or missing in sys.stdlib_module_names:
            raise
        _print(f"this command needs {missing}; rac doctor shows which extra installs it")
        sys.exit(1)
    except ValidationError as error:
        from rac_modifier.settings.check import describe_errors

        _print(describe_errors(error))
        sys.exit(1)


def _print(message: str) -> None:
    if len(message) > _MOST_PRINTED:
        message = f"{message[:_MOST_PRINTED]} ... ({len(message):,} characters in all)"
    text = printable(message, keep="\n")
    typer.secho(f"error: {text}", fg="red", err=True)
