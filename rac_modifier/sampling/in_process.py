"""The engine on the model in memory: batch by batch, with `generate`, in this process or in several.

Of several processes, the first one hands out whole batches and collects the completions. Batches are
the same for any number of processes, so the completions are the same too (on one kind of device).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.model_tools import on_accelerator
from rac_modifier.processes import ALONE, Processes
from rac_modifier.sampling.engine import Completion, EngineKind, EngineRecord, Prompt
from rac_modifier.sampling.generate import Generation, generate
from rac_modifier.settings.sampling import SamplingSettings


class InProcessEngine:
    """Samples from a transformers model; deterministic for a given batch size (see `generate`).

    In the first of several `processes`; meanwhile the others run `help_sampling`.
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

    def connect(self) -> EngineRecord:
        """Return an empty record: the engine holds the model itself."""
        return EngineRecord()

    def iter_completions(
        self, batches: Iterable[Sequence[Prompt]]
    ) -> Iterator[Sequence[Completion]]:
        """Complete as many batches at a time as there are processes."""
        batches = iter(batches)
        while group := list(islice(batches, self._processes.count)):
            work = {
                "sampling": self._sampling.model_dump(mode="json"),
                "batches": [
                    [[prompt.key, list(prompt.ids)] for prompt in batch] for batch in group
                ],
            }
            work = self._processes.from_first(work)
            answers = _complete_share(self._model, self._tokenizer, work, self._processes)
            for batch, answer in zip(group, answers, strict=False):  # the last group may be shorter
                yield [
                    Completion(prompt, Generation(tuple(ids), reason))
                    for prompt, (ids, reason) in zip(batch, answer, strict=True)
                ]

    def close(self) -> None:
        """Do nothing: every batch is complete when it is yielded."""


def help_sampling(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> Any:
    """Complete this process's batches until the first process calls `end_sampling`.

    Returns:
        The value that the first process gave to `end_sampling`.
    """
    with contextlib.ExitStack() as stack:
        placed = False
        while "end" not in (work := processes.from_first()):
            if not placed:
                stack.enter_context(on_accelerator(model))
                placed = True
            _complete_share(model, tokenizer, work, processes)
    return work["end"]


def end_sampling(processes: Processes, value: Any) -> None:
    """Release the processes that help; `help_sampling` returns `value`, which is JSON, in each."""
    processes.from_first({"end": value})


def _complete_share(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    work: dict[str, Any],
    processes: Processes,
) -> list[list[Any]]:
    """Complete this process's batch, if there is one; return the completions of all batches."""
    completions = []
    if processes.rank < len(work["batches"]):
        batch = work["batches"][processes.rank]
        settings = SamplingSettings.model_validate(work["sampling"])
        keys, ids = [key for key, _ in batch], [prompt for _, prompt in batch]
        completions = [
            [list(generation.ids), generation.finish_reason]
            for generation in generate(model, tokenizer, ids, settings, keys)
        ]
    return processes.from_all(completions)
