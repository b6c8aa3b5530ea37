"""The one error a user's mistake raises."""


class RacError(ValueError):
    """Something the user gave cannot work: the message names what, the value, and the next step.

    A ValueError, so that pydantic's validators collect it; the CLI prints its message without a traceback.
    """
