"""Tables of the command line, drawn with rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rac_modifier.evaluation.report import ResultTable

_WIDTH = 100_000  # characters; wider than any table, so that rich neither wraps nor cuts a cell


def render_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, markdown: bool = False
) -> str:
    """A table as plain text, without colour codes: the same on a terminal, in a pipe and in a file.

    Args:
        head: the names of the columns.
        rows: one cell per column; a line break in a cell becomes a space.
        left: this many first columns are aligned to the left, the others to the right.
        markdown: draw a Markdown table.
    """
    table = Table(
        box=box.MARKDOWN if markdown else None,
        pad_edge=markdown,
        padding=(0, 1) if markdown else (0, 2, 0, 0),
        header_style="",
    )
    for number, name in enumerate(head):
        table.add_column(
            _cell(name, markdown), justify="left" if number < left else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*(_cell(cell, markdown) for cell in row))
    text = StringIO()
    Console(file=text, width=_WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())


def render_results(table: ResultTable, *, markdown: bool = False) -> str:
    """Results of models as a table, with the note below."""
    return f"{render_table(table.head, table.rows, markdown=markdown)}\n\n{table.note}"


def _cell(text: str, markdown: bool) -> Text:
    """Not a string, in which rich would read [brackets] as styles."""
    line = " ".join(text.splitlines())
    return Text(line.replace("|", r"\|") if markdown else line)
