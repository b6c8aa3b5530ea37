"""The divergence from the dense model that a run records, with the model pruned in place.

The logits of 2,048 tokens take over a gigabyte with a vocabulary of 150,000. So the input of
the output head is kept, which is not pruned. After pruning it passes through the head in a batch
with the pruned model's input, so that scales and soft caps of logits apply to both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger

from rac_modifier.calibration.calibration_set import CalibrationSet
from rac_modifier.errors import RacError
from rac_modifier.evaluation.divergence import (
    BATCH_TOKENS,
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
    sequence_of,
)
from rac_modifier.model_tools import evaluating


class DenseReference:
    """Inputs of a dense model's output head on its samples, [tokens, d], on the CPU."""

    @torch.no_grad()
    def __init__(self, model: Any, sequences: Sequence[TokenSequence]):
        """Run the dense model without its head.

        Raises:
            RacError: sequences that `divergence` refuses, or a model without an output head.
        """
        check_sequences(sequences)
        check_ids("dense", model, sequences)
        self._batches = list(batches_of_like_length(sequences, BATCH_TOKENS))
        self._head = _probe(output_head(model))
        with evaluating(model):
            self._entering = [
                input_of_head(model, padded(batch)[0][:, :-1]).cpu() for batch in self._batches
            ]

    @torch.no_grad()
    def divergence(self, pruned: Any, *, label: str, bins: int = 8) -> DivergenceResult:
        """Measure what `evaluation.divergence` does, in a forward pass of the pruned model.

        Raises:
            RacError: the output head has changed, or logits are not finite.
        """
        head = output_head(pruned)
        quantized = getattr(head, "quantization_scheme", None) is not None
        if quantized or not torch.equal(_probe(head), self._head):
            raise RacError(
                "the output head was changed too, and with it what the dense model would have "
                "predicted"
            )
        started = time.monotonic()
        rows = []
        with evaluating(pruned):
            for batch, entering in zip(self._batches, self._entering, strict=True):
                rows += compare(batch, self._windows(pruned, head, batch, entering), label)
        seconds = time.monotonic() - started
        return summarise_divergence(rows, label=label, bins=bins, seconds=seconds)

    def _windows(
        self, pruned: Any, head: Any, batch: list[TokenSequence], entering: torch.Tensor
    ) -> Windows:
        ids = padded(batch)[0][:, :-1]
        at = 0

        def append_dense(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            nonlocal at
            x = args[0]
            dense = entering[:, at : at + x.shape[1]].to(x)
            at += x.shape[1]
            return (torch.cat([dense, x]),)

        width = max(1, WINDOW_ELEMENTS // (2 * len(batch) * vocabulary(pruned)))
        hook = head.register_forward_pre_hook(append_dense)
        try:
            for start, logits in windows(pruned, ids, width):
                of_dense, of_pruned = logits.chunk(2)
                yield start, of_dense, of_pruned
        finally:
            hook.remove()


def _probe(head: Any) -> torch.Tensor:
    """Return a sample of the head's weights, to detect a change."""
    return head.weight.detach().flatten()[:: max(head.weight.numel() // 4096, 1)].cpu().clone()


class RunDivergence:
    """KL and top-1 agreement on held-out traces, or the reason why they are not measured."""

    def __init__(self, model: Any, calibration: CalibrationSet, *, off_policy: bool):
        """Run the dense model over these traces, unless another model wrote them (`off_policy`)."""
        self._held_out: DenseReference | None = None
        self._why = ""
        if not calibration.held_out:
            self._why = (
                "no traces were held out (calibration.held_out_tokens, or a mixture without traces)"
            )
        elif off_policy:
            self._why = "the traces may be another model's (traces.allow_off_policy)"
        else:
            sequences = [sequence_of(trace) for trace in calibration.held_out]
            try:
                self._held_out = DenseReference(model, sequences)
            except RacError as error:
                self._why = str(error)
        if self._held_out is None:
            logger.info(f"divergence from the dense model will not be measured: {self._why}")

    def measure(self, model: Any) -> dict[str, Any]:
        """Return the entry of the run record; a failure is recorded and does not stop the run."""
        if self._held_out is None:
            return {"not_measured": self._why}
        try:
            result = self._held_out.divergence(model, label="pruned")
        except (RacError, RuntimeError) as error:
            logger.warning(f"divergence from the dense model was not measured: {error}")
            return {"not_measured": str(error)}
        logger.info(
            f"divergence from the dense model on {result.tokens:,} held-out tokens of its own: "
            f"KL {result.kl:.4f} nats per token, top-1 agreement {result.agreement:.1%}"
        )
        record = result.as_dict()
        del record["label"]
        return record
