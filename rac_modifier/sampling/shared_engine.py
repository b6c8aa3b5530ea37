"""The model in several processes that sample together: the first one asks and stores, and each completes every N-th batch.

Batches are those of one process, so the completions are the same as there (on the same kind of device).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.model_tools import on_accelerator
from rac_modifier.processes import Processes
from rac_modifier.sampling.engine import Completion, Prompt
from rac_modifier.sampling.generate import Generation, generate
from rac_modifier.sampling.in_process import InProcessEngine
from rac_modifier.settings.sampling import SamplingSettings


class SharedEngine(InProcessEngine):
    """Of the first process; meanwhile the others run `help_sampling`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingSettings,
        processes: Processes,
    ):
        super().__init__(model, tokenizer, sampling)
        self._processes = processes

    def iter_completions(
        self, batches: Iterable[Sequence[Prompt]]
    ) -> Iterator[Sequence[Completion]]:
        """Complete as many batches at a time as there are processes."""
        batches = iter(batches)
        while batch := list(islice(batches, self._processes.count)):
            work = {
                "sampling": self._sampling.model_dump(mode="json"),
                "batches": [
                    [[prompt.key, list(prompt.ids)] for prompt in prompts] for prompts in batch
                ],
            }
            parts = _share(
                self._model, self._tokenizer, self._processes.from_first(work), self._processes
            )
            for prompts, found in zip(batch, parts, strict=False):  # fewer batches than processes
                outcomes = [Generation(tuple(ids), reason) for ids, reason in found]
                yield [
                    Completion(prompt, one) for prompt, one in zip(prompts, outcomes, strict=True)
                ]


def help_sampling(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> Any:
    """Complete this process's batches until the first one has no more; returns what it has given to `end_sampling`."""
    with contextlib.ExitStack() as stack:
        placed = False
        while "end" not in (work := processes.from_first()):
            if not placed:
                stack.enter_context(on_accelerator(model))
                placed = True
            _share(model, tokenizer, work, processes)
    return work["end"]


def end_sampling(processes: Processes, value: Any) -> None:
    """Release the processes that help; they get `value`, which is JSON."""
    processes.from_first({"end": value})


def _share(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    work: dict[str, Any],
    processes: Processes,
) -> list[list[Any]]:
    """Complete this process's batch, if there is one; returns the completions of all batches."""
    found = []
    if processes.rank < len(work["batches"]):
        batch = work["batches"][processes.rank]
        settings = SamplingSettings.model_validate(work["sampling"])
        ids, keys = [prompt for _, prompt in batch], [key for key, _ in batch]
        found = [
            [list(one.ids), one.finish_reason]
            for one in generate(model, tokenizer, ids, settings, keys)
        ]
    return processes.from_all(found)
