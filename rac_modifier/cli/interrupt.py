"""Ctrl-C: one line that names the next step, and exit code 130."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@contextmanager
def resumable(next_step: str | Callable[[], str]) -> Iterator[None]:
    """Turn a KeyboardInterrupt of the body into one line on standard error and exit code 130.

    A function as `next_step` is called after the interruption, when it can look at what was written.
    """
    try:
        yield
    except KeyboardInterrupt:
        step = next_step if isinstance(next_step, str) else next_step()
        typer.secho(f"\ninterrupted: {step}", fg="yellow", err=True)  # a new line, below a progress bar
        raise typer.Exit(INTERRUPTED) from None
