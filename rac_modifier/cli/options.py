"""What several commands share: arguments and options, tables and JSON, and what Ctrl-C prints."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rac_modifier.evaluation.tables import ResultTable

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
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        help="change one setting of the recipe, e.g. --set calibration.tokens=32768; null takes it "
        "out (repeatable)",
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


def print_json(obj: Any) -> None:
    """Print one JSON object; paths become text, and NaN is refused."""
    typer.echo(json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=str))


def printable(text: str) -> str:
    """Return `text` with control characters escaped, which a terminal would obey."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


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
