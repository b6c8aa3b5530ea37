"""Prompts, completions, the record of an engine, and the engine on the model in memory."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.runtime.models import on_accelerator
from rac_modifier.sampling.generate import Generation, generate
from rac_modifier.settings.sampling import SamplingSettings

EngineKind = Literal["transformers", "openai"]

_SERVE = (
    "fill the trace store with a server first (rac traces collect MODEL --recipe RECIPE --serve), "
    "or name servers in traces.engine"
)


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete; `key` and the seed of the settings decide what is drawn."""

    key: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Failure:
    """Why an engine could not complete a prompt, after all its tries."""

    reason: str
    of_servers: bool = False  # their state is the reason, not the prompt


Completions = Sequence[tuple[Prompt, Generation | Failure]]


class Probe(BaseModel, extra="forbid", frozen=True):
    """A server's greedy completion of a known prompt, by which its model is told from another."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


class EngineRecord(BaseModel, extra="forbid", frozen=True):
    """The engine that filled a store, as recorded in the header of the store."""

    kind: EngineKind = "transformers"
    served_model: str | None = None
    root: str | None = None  # last name of what the server loaded, as it reports
    probes: tuple[Probe, ...] = ()  # empty without a server, or without the check
    setup: str | None = None  # of an evaluation: how the model ran


class InProcessEngine:
    """Samples from a transformers model; deterministic for a given batch size (see `generate`).

    `batch_size` is the number of prompts per batch of `iter_completions`.
    """

    kind: EngineKind = "transformers"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSettings
    ):
        self.batch_size = sampling.batch_size
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._placed: contextlib.ExitStack | None = None

    def connect(self) -> EngineRecord:
        """Move the model to the accelerator; return an empty record."""
        if self._placed is None:
            self._placed = contextlib.ExitStack()
            self._placed.enter_context(on_accelerator(self._model, _SERVE))
        return EngineRecord()

    def iter_completions(self, batches: Iterable[Sequence[Prompt]]) -> Iterator[Completions]:
        """Complete a batch at a time."""
        for batch in batches:
            prompts, keys = [list(prompt.ids) for prompt in batch], [prompt.key for prompt in batch]
            answers = generate(self._model, self._tokenizer, prompts, self._sampling, keys)
            yield list(zip(batch, answers, strict=True))

    def close(self) -> None:
        """Move the model back to where it was."""
        if self._placed is not None:
            self._placed.close()
