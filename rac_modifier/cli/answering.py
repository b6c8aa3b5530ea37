"""The servers that answer: settings of those that are named, and one of our own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rac_modifier.cli.models import resolve
from rac_modifier.cli.options import Dtype

if TYPE_CHECKING:
    from rac_modifier.settings.sampling import EngineSettings

API_KEY = "OPENAI_API_KEY"  # as in OpenAI's own client
_TIMEOUT = 600.0  # seconds per answer, at least
_LONGEST_TIMEOUT = 1e6
_TOKENS_PER_SECOND = 10.0  # of all answers in progress together, on a slow server


@contextmanager
def own_server(
    model: str, precision: Dtype, concurrency: int, cap: int
) -> Iterator[EngineSettings]:
    """Run `vllm serve` with the model in the context; an answer has at most `cap` tokens."""
    from rac_modifier.sampling.own_server import VllmCommand

    with VllmCommand.from_environment().serve(resolve(model), precision) as url:
        yield engine_of((url,), concurrency, cap)


def engine_of(
    urls: Sequence[str], concurrency: int, cap: int, served_as: str | None = None
) -> EngineSettings:
    """Return the settings of servers whose answers have at most `cap` tokens."""
    from rac_modifier.settings.check import check_settings
    from rac_modifier.settings.sampling import EngineSettings

    slowest = cap * concurrency / _TOKENS_PER_SECOND
    values = {
        "base_urls": urls,
        "model": served_as,
        "concurrency": concurrency,
        "timeout": min(max(_TIMEOUT, slowest), _LONGEST_TIMEOUT),
        "api_key_env": API_KEY if os.environ.get(API_KEY) else None,
    }
    return check_settings(EngineSettings, values, "--server")
