"""Inputs of a causal LM's output head at the positions that predict completion tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rac_modifier.errors import RacError
from rac_modifier.evaluation.teacher_forcing import TokenSequence, input_of_head, padded
from rac_modifier.evaluation.teacher_forcing import output_head as any_head


def output_head(model: Any) -> torch.nn.Module:
    """Return the output embeddings of a causal LM.

    Raises:
        RacError: it has none, or it is not a plain linear layer without a bias.
    """
    head = any_head(model)
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:
        raise RacError(
            f"{type(model).__name__} has no plain linear output head, so its predictions cannot be "
            "recovered from hidden states"
        )
    return head


def predicting_states(model: Any, batch: Sequence[TokenSequence]) -> torch.Tensor:
    """Return hidden states [completion tokens, d] of a batch, row by row, with their gradient.

    Raises:
        RacError: the model does not call its output embeddings.
    """
    ids, completion = padded(batch)
    states = input_of_head(model, ids[:, :-1])
    return states[completion[:, 1:].to(states.device)]  # a position predicts the next token


@torch.no_grad()
def check_head(model: Any, sequence: TokenSequence) -> None:
    """Check that the model's logits are finite, and equal to the output of its head.

    Raises:
        RacError: logits that are not finite, or changed after the head (a soft cap, a scale).
    """
    head, (ids, _) = output_head(model), sequence
    states = predicting_states(model, [sequence])
    logits = model(
        input_ids=torch.tensor([list(ids[:-1])], device=model.device), use_cache=False
    ).logits
    own, expected = head(states[-1:]).float(), logits[:, -1].float()
    if not bool(expected.isfinite().all()):
        raise RacError(
            f"{type(model).__name__} computes logits that are not finite, so recovery cannot measure "
            "it; load it with --precision float32, or leave recover out"
        )
    if not torch.allclose(own, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise RacError(
            f"{type(model).__name__} changes its logits after the output head (a soft cap or a scale), "
            "which recovery does not support; leave recover out"
        )
