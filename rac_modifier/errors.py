"""The error that a user's mistake raises."""


class RacError(ValueError):
    """A user's input cannot work: the message names what, the value, and the next step.

    A ValueError, so that pydantic's validators collect it; the CLI prints it without a traceback.
    """
