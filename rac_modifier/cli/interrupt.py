"""Ctrl-C: one line that names the next step, and exit code 130."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
        typer.secho(
            f"\ninterrupted: {step}", fg="yellow", err=True
        )  # a new line, below a progress bar
        raise typer.Exit(INTERRUPTED) from None


def packing_step(out: Path | None) -> str:
    """The next step after `rac pack` or `rac unpack` was interrupted, from what is in its output folder (None: only looked)."""
    from rac_modifier.checkpoint.files import JOURNAL_FILE
    from rac_modifier.checkpoint.sparsity_config import CONFIG_FILE

    if out is None:
        return "nothing is written; run the same command again"
    if (out / JOURNAL_FILE).exists():
        return f"{out} is written, but not all files have their names yet; run the same command again to finish it"
    if (out / CONFIG_FILE).exists():
        return f"{out} is complete; nothing is left to do"
    return f"{out} is not written; run the same command again"


def saving_step(output: Path, kept: str) -> str:
    """The next step after a command that saves a model was interrupted.

    Args:
        output: its folder, which was new or empty.
        kept: what the next run goes on from, such as "the traces".
    """
    from rac_modifier.checkpoint.files import JOURNAL_FILE
    from rac_modifier.checkpoint.record import CARD_NAME

    text = f"{kept} are kept and will be used; run the same command again"
    if not output.is_dir() or not any(output.iterdir()):
        return text
    if (output / CARD_NAME).exists() and not (
        output / JOURNAL_FILE
    ).exists():  # the card is the model's last file
        return f"{output} holds the whole model; if it has no tokenizer, copy the dense model's into it"
    return f"{output} is not complete: remove it. Then, {text}"
