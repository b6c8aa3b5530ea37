"""`rac report`: the page of one or several frontiers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rac_modifier.errors import RacError


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="folders that rac frontier wrote")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="the page, a .html file")
    ],
    traces: Annotated[
        int,
        typer.Option(
            min=0, max=300, help="problems whose answers can be read on the page, per model"
        ),
    ] = 300,
) -> None:
    """Write a page that shows what rac frontier measured: one HTML file that needs no network.

    Accuracy and divergence against bytes and speed, the layers of each row, thinking lengths, and
    the answers of the dense and the compressed models side by side.

    Example: rac report reasoner-frontier -o report.html
    """
    from rac_modifier.files import write_text_atomic
    from rac_modifier.frontier.page import check_size, page, problems_shown

    if output.suffix not in (".html", ".htm"):
        raise RacError(f"{output} is not the name of a page; use a name that ends in .html")
    if not output.absolute().parent.is_dir():
        raise RacError(f"{output}: its folder does not exist; create it first")
    text = page(folders, traces)
    check_size(text, output, problems_shown(folders, traces))
    write_text_atomic(output, text)
    typer.echo(f"{output}: {len(text.encode()) / 1e6:.2f} MB; open it in a browser")
