"""A collection that can be killed while it writes."""

import os
import time

import torch
from tiny import tiny_model, tiny_tokenizer


def collect_slowly(path: str, settings: dict[str, object], tokens: int) -> None:
    """Entry point of a process that will be killed: writes each line in pieces, so that kills tear lines too."""
    from rac_modifier.traces.collect import collect_traces
    from rac_modifier.traces.generation import SamplingSettings
    from rac_modifier.traces.problems import ProblemSource

    torch.set_num_threads(1)
    write = os.write

    def write_in_pieces(fd: int, data: memoryview) -> int:
        time.sleep(0.01)
        return write(fd, data[:200])

    os.write = write_in_pieces  # type: ignore[assignment]
    collect_traces(
        tiny_model(),
        tiny_tokenizer(),
        path,
        problems=ProblemSource(),
        sampling=SamplingSettings(**settings),  # type: ignore[arg-type]
        tokens=tokens,
        progress=False,
    )
