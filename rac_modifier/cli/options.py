"""What several commands share: arguments and options, tables and JSON, and what Ctrl-C prints."""

import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import typer
from pydantic import BaseModel

from rac_modifier.errors import RacError
from rac_modifier.settings.check import check_settings

if TYPE_CHECKING:
    from rac_modifier.evaluation.tables import ResultTable

S = TypeVar("S", bound=BaseModel)

Model = Annotated[
    str,
    typer.Argument(help='a model folder, a Hugging Face id, or "reasoner" for the embedded one'),
]
Recipe = Annotated[
    Path,
    typer.Option(
        "--recipe",
        "-r",
        help="a file, or the name of a shipped recipe, such as rac_2of4 (see: rac recipes)",
    ),
]
DEFAULT_RECIPE = "rac_w4a16"
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        help="change one setting of the recipe, e.g. --set calibration.tokens=32768 or "
        "GPTQModifier.scheme=W8A8; null takes it out (repeatable)",
    ),
]


Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Precision = Annotated[
    Dtype, typer.Option(metavar="DTYPE", help="auto (as stored), bfloat16, float16 or float32")
]
Source = Annotated[
    str,
    typer.Option(
        help="problems: arithmetic or reasoning-gym:TASK (held out), a file, or a dataset id"
    ),
]
Column = Annotated[str | None, typer.Option(help="column of the question (file or dataset)")]
AsJson = Annotated[
    bool, typer.Option("--json", help="print JSON on standard output, and nothing else there")
]


def takes(settings: type[S]) -> Callable[[Callable[[S], None]], Callable[..., None]]:
    """Make a command of a function of `settings`: each field is an option of its name.

    Only what the user wrote is passed on, so that `model_fields_set` names it.
    """

    def command_of(run: Callable[[S], None]) -> Callable[..., None]:
        @functools.wraps(run)
        def command(context: typer.Context, **given: Any) -> None:
            sources = {name: context.get_parameter_source(name) for name in given}
            written = {n: given[n] for n, s in sources.items() if s and s.name != "DEFAULT"}
            run(check_settings(settings, written, context.command_path))

        hints = get_type_hints(settings, include_extras=True)
        fields = {name: hints[name] for name in settings.model_fields}
        command.__annotations__ = {"context": typer.Context, **fields}
        kind = inspect.Parameter.KEYWORD_ONLY
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter("context", kind, annotation=typer.Context),
                *(
                    inspect.Parameter(name, kind, default=field.default, annotation=fields[name])
                    for name, field in settings.model_fields.items()
                ),
            ]
        )
        return command

    return command_of


def print_json(obj: Any) -> None:
    """Print one JSON object; paths become text, and NaN is refused."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    typer.echo(re.sub(r"[\x7f-\x9f]", lambda c: f"\\u{ord(c[0]):04x}", text))


def processes() -> int:
    """Return how many processes torchrun started (RacError: no number); 1 without it."""
    count = os.environ.get("WORLD_SIZE") or "1"
    if not count.isdecimal():
        raise RacError(f"WORLD_SIZE is {count!r}, and no number; unset it, or start with torchrun")
    return int(count)


def printable(text: str, keep: str = "") -> str:
    """Return `text` with control characters escaped, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def echo(text: str) -> None:
    """Print lines that may hold a stranger's text; line ends and tabs are kept."""
    typer.echo(printable(text, keep="\n\t"))


def render_table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """Return a table as plain text; the first `text_columns` and "note" are aligned to the left."""
    table = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width)
            if number < text_columns or head[number] == "note"
            else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join(line.rstrip() for line in lines)


def render_results(table: "ResultTable") -> str:
    """Return results of models as a table, with the note below."""
    return f"{render_table(table.head, table.rows)}\n\n{table.note}"


@contextmanager
def resumable(next_step: str | Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C in the body into one line, which ends in `next_step`, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        step = next_step if isinstance(next_step, str) else next_step()
        # a new line, below a progress bar
        typer.secho(f"\ninterrupted: {step}", fg="yellow", err=True)
        raise typer.Exit(130) from None  # 128 + SIGINT, as shells have it


def saving_step(output: Path | None, kept: str = "nothing is written") -> str:
    """Return the next step after Ctrl-C; `kept`: what a next run goes on with."""
    from rac_modifier.checkpoint.files import CONFIG_FILE

    if output is None or not output.is_dir() or not any(output.iterdir()):
        return f"{kept}; run the same command again"
    if (output / CONFIG_FILE).exists():  # the last file
        return f"{output} holds the whole model; if it has no tokenizer, copy the dense model's"
    return f"{output} is not complete: remove it, and run the same command again"
