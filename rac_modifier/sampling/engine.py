"""What an engine is: batches of prompts in, completions out, in any order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from rac_modifier.sampling.generate import Generation

EngineKind = Literal["transformers", "openai", "openai text"]
"""`openai text`: servers that return text alone, which was tokenized here: enough to judge answers, not to calibrate on."""


@dataclass(frozen=True)
class Prompt:
    """One prompt to complete; `key` and the seed of the settings decide what is drawn."""

    key: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Failure:
    """Why an engine could not complete a prompt, after all its tries."""

    reason: str


@dataclass(frozen=True)
class Completion:
    """What became of one prompt."""

    prompt: Prompt
    outcome: Generation | Failure


class Probe(BaseModel):
    """A server's greedy completion of a known prompt, by which its model is told from another one, also later."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


class EngineRecord(BaseModel):
    """The engine that filled a store, as recorded in the header of the store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: EngineKind = "transformers"
    served_model: str | None = None
    root: str | None = None
    """The last part of the folder or id that the server loaded the model from, by its own account."""
    probes: tuple[Probe, ...] = ()
    """Empty for the model in this process, and where the check was switched off."""


class Engine(Protocol):
    """Completes prompts. An engine is made for one collection and closed at its end."""

    kind: EngineKind
    batch_size: int
    """Prompts per batch of `iter_completions`."""

    def connect(self) -> EngineRecord:
        """Check that the engine serves the right model; to be called first, and cheap from the second call on.

        Raises:
            RacError: it cannot be reached, or serves another model.
        """

    def iter_completions(
        self, batches: Iterable[Sequence[Prompt]]
    ) -> Iterator[Sequence[Completion]]:
        """Complete prompts; yields whenever some are finished, until `batches` ends and every prompt is finished.

        Prompts of one batch are computed together where that matters for rounding. Batches are taken from the iterable, in
        the caller's thread, only as there is room to work on them: so what it yields may depend on completions so far.

        Raises:
            RacError: there is no point in going on. What was finished before has been yielded.
        """

    def close(self) -> None:
        """Give up the prompts that are not finished, and free what the engine holds."""
