"""The default engine: the model in this process, batch by batch, with `generate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rac_modifier.sampling.engine import Completion, EngineKind, EngineRecord, Prompt
from rac_modifier.sampling.generate import generate
from rac_modifier.settings.sampling import SamplingSettings


class InProcessEngine:
    """Samples from a transformers model; deterministic for a given batch size (see `generate`)."""

    kind: EngineKind = "transformers"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSettings
    ):
        self.batch_size = sampling.batch_size
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling

    def connect(self) -> EngineRecord:
        """Nothing to check: the engine holds the model itself."""
        return EngineRecord()

    def iter_completions(
        self, batches: Iterable[Sequence[Prompt]]
    ) -> Iterator[Sequence[Completion]]:
        """Complete one batch after the other, each as a whole."""
        for batch in batches:
            ids, keys = [list(prompt.ids) for prompt in batch], [prompt.key for prompt in batch]
            generations = generate(self._model, self._tokenizer, ids, self._sampling, keys)
            yield [Completion(prompt, one) for prompt, one in zip(batch, generations, strict=True)]

    def close(self) -> None:
        """No-op: batches complete synchronously."""
