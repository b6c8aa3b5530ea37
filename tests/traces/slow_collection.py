"""A collection that can be killed while it writes."""

import os
import time

import torch

from tests.tiny import tiny_model, tiny_tokenizer


def collect_slowly(
    path: str, settings: dict[str, object], tokens: int, url: str | None = None
) -> None:
    """Entry point of a process that will be killed: writes each line in pieces, so that kills tear lines too.

    With `url`, from the server there, without the model in memory.
    """
    from rac_modifier.sampling.model_identity import ModelIdentity
    from rac_modifier.settings.problems import ProblemSource
    from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
    from rac_modifier.traces.collect import collect_traces

    torch.set_num_threads(1)
    write = os.write

    def write_in_pieces(fd: int, data: memoryview) -> int:
        time.sleep(0.01)
        return write(fd, data[:200])

    os.write = write_in_pieces  # type: ignore[assignment]
    model = tiny_model()
    collect_traces(
        ModelIdentity.of_model(model) if url else model,
        tiny_tokenizer(),
        path,
        problems=ProblemSource(),
        sampling=SamplingSettings(**settings),  # type: ignore[arg-type]
        tokens=tokens,
        engine=EngineSettings(base_urls=(url,), concurrency=8) if url else None,
        progress=False,
    )
