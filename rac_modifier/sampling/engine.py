"""What an engine is, and the engine on the model in memory: batches of prompts in, completions out.

Of several processes, the first one hands out whole batches and collects the completions. Their
number does not change the batches, so it does not change the completions (on one kind of device).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.model_tools import on_accelerator
from rac_modifier.processes import ALONE, Processes
from rac_modifier.sampling.generate import Generation, generate
from rac_modifier.settings.sampling import SamplingSettings

EngineKind = Literal["transformers", "openai"]

_SERVE = (
    "fill the trace store with a server first, which can divide the model over several devices "
    "(rac traces collect MODEL --recipe RECIPE --serve), and start this run again; or name servers "
    "in traces.engine"
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


@dataclass(frozen=True)
class Completion:
    """The outcome of a prompt."""

    prompt: Prompt
    outcome: Generation | Failure


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Probe(_Record):
    """A server's greedy completion of a known prompt, by which its model is told from another."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


class EngineRecord(_Record):
    """The engine that filled a store, as recorded in the header of the store."""

    kind: EngineKind = "transformers"
    served_model: str | None = None
    root: str | None = None  # last name of what the server loaded, as it reports
    probes: tuple[Probe, ...] = ()  # empty without a server, or without the check


class Engine(Protocol):
    """Completes prompts. An engine is made for one collection and closed at its end."""

    kind: EngineKind
    batch_size: int  # prompts per batch of `iter_completions`

    def connect(self) -> EngineRecord:
        """Check, before the first completion, that the engine has the right model (RacError)."""

    def iter_completions(
        self, batches: Iterable[Sequence[Prompt]]
    ) -> Iterator[Sequence[Completion]]:
        """Complete prompts; yields whenever some are finished, until every prompt is.

        Batches are taken in the caller's thread, only when they can be worked on: they may depend
        on completions so far.
        """

    def close(self) -> None:
        """Give up unfinished prompts, and free what the engine holds."""


class InProcessEngine:
    """Samples from a transformers model; deterministic for a given batch size (see `generate`).

    In the first of several `processes`; meanwhile the others run `help_sampling`. The model
    is on the accelerator, if there is one, from `connect` to `close`.
    """

    kind: EngineKind = "transformers"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingSettings,
        processes: Processes = ALONE,
    ):
        self.batch_size = sampling.batch_size
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._processes = processes
        self._placed = contextlib.ExitStack()
        self._is_placed = False

    def connect(self) -> EngineRecord:
        """Move the model to the accelerator; return an empty record."""
        if not self._is_placed:
            self._placed.enter_context(on_accelerator(self._model, _SERVE))
            self._is_placed = True
        return EngineRecord()

    def iter_completions(
        self, batches: Iterable[Sequence[Prompt]]
    ) -> Iterator[Sequence[Completion]]:
        """Complete as many batches at a time as there are processes."""
        batches = iter(batches)
        sampling = self._sampling.model_dump(mode="json")
        while by_rank := list(islice(batches, self._processes.count)):
            prompts = [[[prompt.key, list(prompt.ids)] for prompt in batch] for batch in by_rank]
            job = self._processes.from_first({"sampling": sampling, "batches": prompts})
            answers = _complete_share(self._model, self._tokenizer, job, self._processes)
            for batch, answer in zip(by_rank, answers, strict=False):  # fewer batches at the end
                yield [
                    Completion(prompt, Generation(tuple(ids), reason))
                    for prompt, (ids, reason) in zip(batch, answer, strict=True)
                ]

    def close(self) -> None:
        """Move the model back to where it was."""
        self._placed.close()


def help_sampling(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> Any:
    """Complete this process's batches; return the value that the first gives to `end_sampling`."""
    with contextlib.ExitStack() as placed:
        while "end" not in (job := processes.from_first()):
            placed.enter_context(on_accelerator(model, _SERVE))
            _complete_share(model, tokenizer, job, processes)
    return job["end"]


def end_sampling(processes: Processes, value: Any) -> None:
    """Release the processes that help; `help_sampling` returns `value`, which is JSON, in each."""
    processes.from_first({"end": value})


def _complete_share(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    job: dict[str, Any],
    processes: Processes,
) -> list[list[Any]]:
    """Complete this process's batch, if there is one; return the completions of all batches."""
    completions = []
    if processes.rank < len(job["batches"]):
        keys, ids = zip(*job["batches"][processes.rank], strict=True)
        settings = SamplingSettings.model_validate(job["sampling"])
        generated = generate(model, tokenizer, list(ids), settings, list(keys))
        completions = [[list(answer.ids), answer.finish_reason] for answer in generated]
    return processes.from_all(completions)
