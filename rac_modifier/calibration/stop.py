"""The signal between a calibration hook and the pipeline that runs the forward pass."""


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Raised by a hook once it has seen all that it wants of a subgraph: the rest of this forward pass is not needed."""
