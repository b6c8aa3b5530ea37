"""The error that a user's mistake raises, also for errors of libraries."""

import contextlib
from collections.abc import Iterator


class RacError(ValueError):
    """A user's input cannot work: the message names what, the value, and the next step.

    A ValueError, so that pydantic's validators collect it; the CLI prints it without a traceback.
    """


@contextlib.contextmanager
def refusing(problem: str, next_step: str, *errors: type[Exception]) -> Iterator[None]:
    """Raise a RacError "problem (error); next step" for these errors of the body."""
    try:
        yield
    except errors as error:
        raise RacError(f"{problem} ({error}); {next_step}") from error
