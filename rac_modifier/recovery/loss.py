"""KL(dense || student) of next-token predictions, from what enters the output head of both.

For one completion token with dense logits t and student logits s, p = softmax(t), q = softmax(s):

    KL = sum_v p_v (log p_v - log q_v)        dKL/ds = q - p        dKL/dh = (q - p) W_head

The head is frozen and the same for both, so that the gradient with respect to the student's hidden state h is all that is needed.
It is computed together with the loss, in chunks of tokens: logits of 2,048 tokens would be 1.2 GB at a vocabulary of 150,000.
"""

from __future__ import annotations

from typing import Any

import torch

# Logits of one model held at once, in elements.
_CHUNK_ELEMENTS = 1 << 25


def head_kl(hidden: torch.Tensor, dense_hidden: torch.Tensor, head: torch.nn.Module) -> torch.Tensor:
    """The sum over tokens of KL(dense || student), in nats; differentiable with respect to `hidden` alone.

    Args:
        hidden: what the student gives to its head, [tokens, d].
        dense_hidden: the same of the dense model, [tokens, d], on any device.
        head: the output head of both, applied without gradient for its own weights.
    """
    return _HeadKL.apply(hidden, dense_hidden, head)


class _HeadKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, dense_hidden: torch.Tensor, head: Any) -> torch.Tensor:
        weight = head.weight
        step = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            dense = dense_hidden[part].to(device=hidden.device, dtype=weight.dtype)
            log_p = head(dense).float().log_softmax(-1)
            log_q = head(hidden[part].to(weight.dtype)).float().log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum(dtype=torch.float64)
            gradient[part] = ((log_q.exp_() - p).to(weight.dtype) @ weight).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None
