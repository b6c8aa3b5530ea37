"""The default engine: the model in this process, batch by batch, with `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.sampling.engine import EngineKind, EngineRecord, Failure, Prompt
from rac_modifier.sampling.generate import Generation, generate
from rac_modifier.settings.sampling import SamplingSettings


class InProcessEngine:
    """Samples from a transformers model; deterministic for a given batch size (see `generate`)."""

    kind: EngineKind = "transformers"
    concurrency = 0

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSettings):
        self.batch_size = sampling.batch_size
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling

    def connect(self) -> EngineRecord:
        """Nothing to check: it is the model."""
        return EngineRecord()

    def submit(self, prompts: Sequence[Prompt]) -> list[Future[Generation | Failure]]:
        """Complete the batch before returning."""
        generations = generate(
            self._model, self._tokenizer, [p.ids for p in prompts], self._sampling, [p.key for p in prompts]
        )
        futures: list[Future[Generation | Failure]] = []
        for generation in generations:
            futures.append(Future())
            futures[-1].set_result(generation)
        return futures

    def close(self) -> None:
        """Nothing is under way between two batches."""
