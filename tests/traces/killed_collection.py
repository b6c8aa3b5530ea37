"""A collection that kills itself while it writes."""

import os
import signal

import torch

from tests.tiny import tiny_model, tiny_tokenizer


def collect(
    path: str, settings: dict[str, object], tokens: int, url: str | None, pieces: int | None = None
) -> None:
    """Collect from this process, or from the server at `url` without the model in memory.

    Lines are written in pieces; the process ends by SIGKILL within a line, after `pieces` of them.
    """
    from rac_modifier.sampling.model_identity import ModelIdentity
    from rac_modifier.settings.calibration import TraceSettings
    from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
    from rac_modifier.traces.collect import collect_traces

    torch.set_num_threads(1)
    write, written = os.write, 0

    def write_piece(fd: int, data: memoryview) -> int:
        nonlocal written
        count = write(fd, data[:200])
        written += 1
        if written >= pieces and not bytes(data[:count]).endswith(b"\n"):
            os.kill(os.getpid(), signal.SIGKILL)
        return count

    if pieces is not None:
        os.write = write_piece  # type: ignore[assignment]
    model = tiny_model()
    trace_settings = TraceSettings(
        store=path,
        sampling=SamplingSettings(**settings),  # type: ignore[arg-type]
        engine=EngineSettings(base_urls=[url], concurrency=8) if url else None,
    )
    identity = ModelIdentity.of_model(model) if url else model
    collect_traces(identity, tiny_tokenizer(), trace_settings, tokens)
