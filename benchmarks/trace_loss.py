"""The loss of a model on given answers, which ranks pruned models as their accuracy does, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from rac_modifier.evaluation.teacher_forcing import (
    TokenSequence,
    batches_of_like_length,
    check_sequences,
    padded,
)
from rac_modifier.model_tools import evaluating


@torch.no_grad()
def trace_loss(model: Any, sequences: Sequence[TokenSequence], batch_tokens: int = 4096) -> float:
    """Mean teacher-forced negative log-likelihood of completion tokens, in nats per token.

    Args:
        model: a transformers causal LM.
        sequences: token ids and the length of the prompt, on which no loss is counted.
        batch_tokens: most padded tokens of a batch; a longer sequence gets its own batch.

    Raises:
        RacError: no sequences, or one without a prompt or without a completion.
    """
    check_sequences(sequences)
    with evaluating(model):
        losses = [
            _batch_loss(model, batch) for batch in batches_of_like_length(sequences, batch_tokens)
        ]
    return sum(losses) / sum(len(ids) - prompt_length for ids, prompt_length in sequences)


def _batch_loss(model: Any, batch: list[TokenSequence]) -> float:
    """The sum of the loss over a batch."""
    ids, completion = padded(batch)
    target = ids.masked_fill(~completion, -100)
    logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        target[:, 1:].flatten().to(logits.device),
        ignore_index=-100,
        reduction="sum",
    ).item()
