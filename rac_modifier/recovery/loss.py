"""KL(dense || student) of next-token predictions, from what enters the output head of both.

For one completion token with dense logits t and student logits s, p = softmax(t), q = softmax(s):

    KL = sum_v p_v (log p_v - log q_v)        dKL/ds = q - p        dKL/dh = (q - p) W_head

Both models have the same frozen head, so only the gradient of the student's hidden state h is needed. It
is computed with the loss, in chunks of tokens: logits of 2,048 tokens would be 1.2 GB at a vocabulary of
150,000. A CPU takes fewer tokens per softmax, so that their logits stay in its cache.
"""

from __future__ import annotations

from typing import Any

import torch

from rac_modifier.platform import matmul

# Logits of one model held at once, in elements.
_CHUNK_ELEMENTS = 1 << 25
# Of these, in float32 at once on a CPU: 2 MiB.
_CACHED_ELEMENTS = 1 << 19


def head_kl(
    hidden: torch.Tensor, dense_hidden: torch.Tensor, head: torch.nn.Module
) -> torch.Tensor:
    """Return the sum over tokens of KL(dense || student), in nats, with a gradient for `hidden` alone.

    Args:
        hidden: input of the student's head, [tokens, d].
        dense_hidden: input of the dense model's head, [tokens, d], on any device.
        head: the output head of both, applied without gradient for its own weights.
    """
    return _HeadKL.apply(hidden, dense_hidden, head)


class _HeadKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, dense_hidden: torch.Tensor, head: Any
    ) -> torch.Tensor:
        weight = head.weight
        step = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        trained = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if trained else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            dense = matmul(
                dense_hidden[part].to(device=hidden.device, dtype=weight.dtype), weight.T
            )
            own = matmul(hidden[part].to(weight.dtype), weight.T)
            total += _kl_(own, dense, trained)
            if gradient is not None:
                gradient[part] = matmul(own, weight).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None


def _kl_(own: torch.Tensor, dense: torch.Tensor, trained: bool) -> torch.Tensor:
    """Return the sum over tokens of the KL of logits [tokens, vocabulary], float64; both are overwritten.

    KL = sum_v p_v (t_v - s_v) - lse(t) + lse(s), with lse the logarithm of the sum of exponentials. With
    `trained`, `own` becomes the gradient q - p.
    """
    rows = max(1, _CACHED_ELEMENTS // own.shape[1]) if own.device.type == "cpu" else len(own)
    total = torch.zeros((), dtype=torch.float64, device=own.device)
    for own_part, dense_part in zip(own.split(rows), dense.split(rows), strict=True):
        s, t = own_part.float(), dense_part.float()
        q, p = s.softmax(-1), t.softmax(-1)
        sums = _log_sum_exp(t, p) - _log_sum_exp(s, q)
        total += (torch.linalg.vecdot(p, t.sub_(s)) - sums).sum(dtype=torch.float64)
        if trained:
            own_part.copy_(q.sub_(p))
    return total


def _log_sum_exp(logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return the largest logit less the logarithm of its probability."""
    return logits.amax(-1) - probabilities.amax(-1).log()
