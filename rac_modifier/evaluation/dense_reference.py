"""The dense model's predictions, kept small while it is pruned in place.

The logits of 2,048 tokens take over a gigabyte with a vocabulary of 150,000, so the input of the output
head is kept, which is not pruned. After pruning it passes through the head in a batch with the pruned
model's, so that scales and soft caps of logits apply to both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from rac_modifier.errors import RacError
from rac_modifier.evaluation.divergence import (
    WINDOW_ELEMENTS,
    DivergenceResult,
    Windows,
    check_ids,
    compare,
    summarise_divergence,
    vocabulary,
    windows,
)
from rac_modifier.evaluation.teacher_forcing import (
    TokenSequence,
    batches_of_like_length,
    check_sequences,
    input_of_head,
    output_head,
    padded,
)
from rac_modifier.model_tools import evaluating


class DenseReference:
    """Inputs of a dense model's output head on its own samples: tokens x hidden numbers, on the CPU."""

    @torch.no_grad()
    def __init__(self, model: Any, sequences: Sequence[TokenSequence], *, batch_tokens: int = 4096):
        """Run the dense model without its head.

        Raises:
            RacError: sequences that `divergence` refuses, or a model without an output head.
        """
        check_sequences(sequences)
        check_ids("dense", model, sequences)
        self._batches = list(batches_of_like_length(sequences, batch_tokens))
        self._head = _probe(output_head(model))
        with evaluating(model):
            self._entering = [
                input_of_head(model, padded(batch)[0][:, :-1]).cpu() for batch in self._batches
            ]

    @property
    def tokens(self) -> int:
        """Count the completion tokens."""
        return sum(len(ids) - prompt for batch in self._batches for ids, prompt in batch)

    @torch.no_grad()
    def divergence(self, pruned: Any, *, label: str, bins: int = 8) -> DivergenceResult:
        """Measure what `evaluation.divergence` does, in a forward pass of the pruned model.

        Raises:
            RacError: the output head has changed, or logits are not finite.
        """
        head = output_head(pruned)
        if (
            not torch.equal(_probe(head), self._head)
            or getattr(head, "quantization_scheme", None) is not None
        ):
            raise RacError(
                "the output head was changed too, and with it what the dense model would have predicted"
            )
        started = time.monotonic()
        rows = []
        with evaluating(pruned):
            for batch, entering in zip(self._batches, self._entering, strict=True):
                rows += compare(batch, self._windows(pruned, head, batch, entering), label)
        return summarise_divergence(
            rows, label=label, bins=bins, seconds=time.monotonic() - started
        )

    def _windows(
        self, pruned: Any, head: Any, batch: list[TokenSequence], entering: torch.Tensor
    ) -> Windows:
        ids = padded(batch)[0][:, :-1]
        at = 0

        def beside(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            nonlocal at
            x = args[0]
            dense = entering[:, at : at + x.shape[1]].to(x)
            at += x.shape[1]
            return (torch.cat([dense, x]),)

        width = max(1, WINDOW_ELEMENTS // (2 * len(batch) * vocabulary(pruned)))
        hook = head.register_forward_pre_hook(beside)
        try:
            for start, logits in windows(pruned, ids, width):
                dense, own = logits.chunk(2)
                yield start, dense, own
        finally:
            hook.remove()


def _probe(head: Any) -> torch.Tensor:
    """A sample of the head's weights, to detect a change."""
    return head.weight.detach().flatten()[:: max(head.weight.numel() // 4096, 1)].cpu().clone()
