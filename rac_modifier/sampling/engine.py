"""What every engine is to the collector: prompts in, token ids and a finish reason out, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from rac_modifier.sampling.generate import Generation

EngineKind = Literal["transformers", "openai"]


@dataclass(frozen=True)
class Prompt:
    """One completion to sample; `key` and the seed of the settings decide its draw."""

    key: str
    ids: list[int]


@dataclass(frozen=True)
class Failure:
    """A prompt that an engine could not complete, after all its tries."""

    reason: str


class Probe(BaseModel):
    """What a server answered greedily to a known prompt: tells its model from another one, also later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


class EngineRecord(BaseModel):
    """What the header of a store says about the engine that filled it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: EngineKind = "transformers"
    served_model: str | None = None
    root: str | None = None
    """Where the server says it loaded the model from."""
    probes: tuple[Probe, ...] = ()
    """Empty for the model in this process, and where the check was switched off."""


class Engine(Protocol):
    """Completes prompts. One is made for each collection and closed at its end."""

    kind: EngineKind
    batch_size: int
    """Prompts that are handed over together; the last batch may be smaller."""
    concurrency: int
    """Prompts under way at once. With 0, `submit` returns when its batch is complete."""

    def connect(self) -> EngineRecord:
        """Check that the engine serves the right model; cheap from the second call on. Raises RacError."""

    def submit(self, prompts: Sequence[Prompt]) -> list[Future[Generation | Failure]]:
        """Begin to complete a batch. A future raises RacError where going on makes no sense."""

    def close(self) -> None:
        """Give up what is under way."""
