"""The next token of each row: temperature, top-k and top-p, then Gumbel noise. A whole vocabulary is never sorted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rac_modifier.sampling.row_noise import gumbel_noise

_CANDIDATES = 256  # of top-p, at first; where they hold too little probability, eight times as many are looked at


@dataclass(frozen=True)
class Draw:
    """How a token is drawn; in the order of transformers: temperature, top-k, then top-p on what top-k left.

    Attributes:
        temperature: 0 is the arg max.
        top_k: how many of the likeliest tokens may be drawn; 0 for all.
        top_p: of these, the likeliest whose probabilities add up to this may be drawn; 1.0 for all. One always may.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0

    def tokens(self, logits: torch.Tensor, rows: torch.Tensor, position: int) -> torch.Tensor:
        """Token ids [rows] drawn from logits [rows, vocabulary]; `rows` are the rows' keys (`row_noise.row_keys`).

        The noise of a token is a function of (row key, position, token), so it is the same whichever others are candidates.
        """
        if not self.temperature:
            return logits.argmax(-1)
        scores = logits.float() / self.temperature
        vocabulary = scores.shape[-1]
        if not self.top_k and self.top_p >= 1.0:
            return (
                scores
                + gumbel_noise(rows, position, torch.arange(vocabulary, device=scores.device))
            ).argmax(-1)
        values, ids = self._candidates(scores)
        return ids.gather(
            1, (values + gumbel_noise(rows, position, ids)).argmax(-1, keepdim=True)
        ).squeeze(1)

    def _candidates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores and ids [rows, candidates], likeliest first; -inf for those that may not be drawn."""
        vocabulary = scores.shape[-1]
        if self.top_k:
            values, ids = scores.topk(min(self.top_k, vocabulary))
            probabilities = values.softmax(-1)
        else:
            total = scores.logsumexp(-1, keepdim=True)
            count = min(_CANDIDATES, vocabulary)
            while True:
                values, ids = scores.topk(count)
                probabilities = (values - total).exp()
                if count == vocabulary or bool((probabilities.sum(-1) >= self.top_p).all()):
                    break
                count = min(8 * count, vocabulary)
        likelier = probabilities.cumsum(-1) - probabilities  # than this one, together
        likelier[:, 0] = 0.0
        return values.masked_fill(likelier >= self.top_p, -torch.inf), ids
